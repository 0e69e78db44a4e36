"""Everything that a run decides before its first step, with errors that name the option."""

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

import torch

from blip3o_fast.checkpoint import Checkpoint, load_checkpoint
from blip3o_fast.config import DiTConfig
from blip3o_fast.data.dataset import EmbeddingDataset
from blip3o_fast.data.manifest import Manifest
from blip3o_fast.data.order import epoch_order, steps_per_epoch
from blip3o_fast.devices import find_device
from blip3o_fast.errors import OptionError
from blip3o_fast.flow import RectifiedFlowLoss
from blip3o_fast.hub import typed
from blip3o_fast.options.train import TrainingOptions
from blip3o_fast.processes import World
from blip3o_fast.training.optimizer import OptimizerKind, Schedule, choose_optimizer
from blip3o_fast.training.precision import Precision, choose_precision

DEFAULT_WARMUP = 100
_SCALE_SAMPLES = 256
_SCALE_LOOK = 8
"""Samples whose deviation decides the scale, and those that show whether one was forgotten."""
_MODEL_OPTIONS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("intermediate_size", "initializer_range"),
)
"""Model options whose None means the preset's value."""
_MODEL_CHOICES = (
    *("conventions", "use_3d_rope", "rope_theta", "use_sandwich_norm", "use_eva_adapter"),
    *("eva_adapter_layers", "eva_adapter_dropout", "dropout_prob", "attention_dropout"),
    "layer_scale_init_value",
)


@dataclass(frozen=True)
class TrainingPlan:
    """A run that can start.

    Attributes:
        options: as given.
        config: of the model, with all sizes and the scale decided.
        train, heldout: the two sides of the data; no photo is on both.
        data_digest: names the data and its split.
        device: of this process.
        precision, optimizer: as decided for this device.
        schedule: of the learning rate, over all steps.
        steps_per_epoch: optimizer steps of one pass.
        target_deviation: standard deviation of some targets, times the scale factor; the noise has
            1.
        initial: weights to start from, or None.
    """

    options: TrainingOptions
    config: DiTConfig
    train: EmbeddingDataset
    heldout: EmbeddingDataset
    data_digest: str
    device: torch.device
    precision: Precision
    optimizer: OptimizerKind
    schedule: Schedule
    steps_per_epoch: int
    target_deviation: float
    initial: Checkpoint | None

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.schedule.total

    @property
    def loss(self) -> RectifiedFlowLoss:
        """The training loss."""
        return RectifiedFlowLoss(
            weights=self.options.loss_weights,
            conventions=self.config.conventions,
            masks=self.options.use_timestep_weighting,
        )

    @property
    def compile_mode(self) -> str | None:
        """Of ``torch.compile``, None for eager."""
        return self.options.compile_mode if self.options.compile else None

    def describe(self) -> dict[str, Any]:
        """What the run will do, JSON-ready."""
        return {
            "training_samples": len(self.train),
            "training_photos": self.train.photos,
            "heldout_samples": len(self.heldout),
            "heldout_photos": self.heldout.photos,
            "steps": self.total_steps,
            "steps_per_epoch": self.steps_per_epoch,
            "warmup_steps": self.schedule.warmup,
            "device": str(self.device),
            "precision": self.precision.name,
            "optimizer": self.optimizer,
            "target_deviation": round(self.target_deviation, 3),
            "model": self.config.to_dict(),
        }


def make_plan(options: TrainingOptions, world: World) -> TrainingPlan:
    """Check the options against each other and against the data.

    Raises:
        OptionError: naming the option or the shard, what was expected and what came.
    """
    device = find_device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", world.local_rank)
    if options.compile and options.parallel == "fsdp":
        raise OptionError("compile: expected off with parallel=fsdp, got on")
    train, heldout = open_data(options)
    per_epoch = _epoch_steps(options, len(train), world)
    schedule = _schedule(options, per_epoch)
    initial = _initial(options)
    config = resolve_config(options, train, None if initial is None else initial.config)
    return TrainingPlan(
        options=options,
        config=config,
        train=train,
        heldout=heldout,
        data_digest=data_digest(options, train.manifest),
        device=device,
        precision=choose_precision(options.precision, options.fp16, device),
        optimizer=choose_optimizer(options.optimizer, device),
        schedule=schedule,
        steps_per_epoch=per_epoch,
        target_deviation=config.simple_scale_factor * _deviation(train, options.seed, _SCALE_LOOK),
        initial=initial,
    )


def open_data(options: TrainingOptions) -> tuple[EmbeddingDataset, EmbeddingDataset]:
    """The training side and the held-out side."""
    folder = options.chunked_embeddings_dir
    try:
        manifest = Manifest.load(folder)
        tokens = math.prod(manifest.grid) + (options.training_mode == "cls_patch")
        train, heldout = (
            EmbeddingDataset(
                folder,
                split=side,
                heldout_fraction=options.heldout_fraction,
                tokens=tokens,
                max_shards=options.max_shards,
            )
            for side in ("train", "heldout")
        )
    except (OSError, ValueError) as error:
        raise OptionError(f"chunked_embeddings_dir: {error}") from error
    if not train.eva_width or not train.clip_width:
        raise OptionError(
            f"chunked_embeddings_dir: expected both towers, got eva width {train.eva_width} and "
            f"clip width {train.clip_width}"
        )
    return train, heldout


def data_digest(options: TrainingOptions, manifest: Manifest) -> str:
    """A hash of the samples and their split; a copy of the data has the same."""
    shards = [entry.sha256 for entry in manifest.shards[: options.max_shards]]
    split = manifest.to_dict()["split"] if options.heldout_fraction is None else None
    return hashlib.sha256(json.dumps([shards, split], sort_keys=True).encode()).hexdigest()


def resolve_config(
    options: TrainingOptions, data: EmbeddingDataset, initial: DiTConfig | None
) -> DiTConfig:
    """The model's configuration: sizes from the options, widths and grid from the data.

    Raises:
        OptionError: if an option or the initial checkpoint disagrees with the data.
    """
    if initial is not None:
        for name in _MODEL_OPTIONS:
            given, brought = getattr(options, name), getattr(initial, name)
            if given is not None and given != brought:
                raise OptionError(f"{name}: expected {brought}, that of init_from, got {given}")
    facts: dict[str, Any] = {
        "eva_embedding_size": data.eva_width,
        "clip_embedding_size": data.clip_width,
        "grid": data.grid,
        "num_tokens": data.tokens,
        "training_mode": options.training_mode,
    }
    for name in ("eva_embedding_size", "clip_embedding_size", "grid"):
        given = getattr(options, name)
        if given is not None and given != facts[name]:
            raise OptionError(f"{name}: expected {facts[name]}, as in the data, got {given}")
    if initial is not None:
        for name, value in facts.items():
            if getattr(initial, name) != value:
                raise OptionError(
                    f"init_from: expected {name} {value}, as in the data, "
                    f"got {getattr(initial, name)}"
                )
    chosen = {n: getattr(options, n) for n in _MODEL_OPTIONS if getattr(options, n) is not None}
    chosen |= {name: getattr(options, name) for name in _MODEL_CHOICES}
    trained = {
        "condition_dropout": options.condition_dropout,
        "use_gradient_checkpointing": options.gradient_checkpointing,
        "simple_scale_factor": _scale_factor(options, data),
    }
    try:
        if initial is not None:
            return initial.replace(**trained)
        rows = max(256, data.tokens)
        return DiTConfig.preset(
            options.model_size, **facts, **chosen, **trained, max_position_embeddings=rows
        )
    except ValueError as error:
        raise OptionError(str(error)) from error


def _initial(options: TrainingOptions) -> Checkpoint | None:
    if options.init_from is None:
        return None
    try:
        return load_checkpoint(typed(options.init_from))
    except (OSError, ValueError) as error:
        raise OptionError(f"init_from: {error}") from error


def _epoch_steps(options: TrainingOptions, samples: int, world: World) -> int:
    if options.batch_size % world.size:
        raise OptionError(
            f"batch_size: expected a multiple of the {world.size} processes, "
            f"got {options.batch_size}"
        )
    if options.batch_size > samples:
        raise OptionError(
            f"batch_size: expected at most {samples}, the training samples, "
            f"got {options.batch_size}"
        )
    if options.gradient_accumulation_steps > options.batch_size // world.size:
        raise OptionError(
            f"gradient_accumulation_steps: expected at most {options.batch_size // world.size}, "
            f"the samples of a process, got {options.gradient_accumulation_steps}"
        )
    return steps_per_epoch(samples, options.batch_size)


def _schedule(options: TrainingOptions, per_epoch: int) -> Schedule:
    total = options.max_steps or per_epoch * options.num_epochs
    warmup = options.warmup_steps
    if warmup is None:
        warmup = min(DEFAULT_WARMUP, total // 10)
    if warmup >= total:
        raise OptionError(
            f"warmup_steps: expected fewer than {total}, the steps of the run, got {warmup}"
        )
    return Schedule(options.learning_rate, warmup, total)


def _scale_factor(options: TrainingOptions, data: EmbeddingDataset) -> float:
    """The factor as given; ``auto``: 1 over the standard deviation of some targets."""
    if options.simple_scale_factor != "auto":
        return float(options.simple_scale_factor)
    deviation = _deviation(data, options.seed, _SCALE_SAMPLES)
    if deviation == 0:
        raise OptionError("simple_scale_factor: auto expects targets that vary, got constant ones")
    return 1 / deviation


def _deviation(data: EmbeddingDataset, seed: int, samples: int) -> float:
    """The standard deviation of the targets of some samples."""
    total = squares = count = 0.0
    for index in epoch_order(len(data), seed, 0)[:samples]:
        values = data.read([int(index)]).clip.double()
        total += float(values.sum())
        squares += float(values.square().sum())
        count += values.numel()
    return math.sqrt(max(squares / count - (total / count) ** 2, 0.0))
