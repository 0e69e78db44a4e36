"""Every option of a training run, in one frozen record.

The record is the single source of the command line: a field's name is its flag, its type says what
the flag takes, the docstring is its help. Names shared with the published ``train_dit.py`` keep
their meaning.
"""

import argparse
import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from blip3o_fast.checked import (
    Amount,
    Count,
    Fraction,
    Index,
    Positive,
    Range,
    Share,
    check,
    check_names,
    from_json,
    parse_json,
)
from blip3o_fast.errors import OptionError
from blip3o_fast.flags import Flag, add_flags
from blip3o_fast.untrusted import reading
from blip3o_fast.words import DeviceName

FREE = frozenset(
    (
        *("chunked_embeddings_dir", "output_dir", "num_workers", "prefetch"),
        *("gradient_accumulation_steps", "max_nonfinite_steps", "device"),
        *("gradient_checkpointing", "compile", "compile_mode", "deterministic"),
        *("eval_batch_size", "save_every_n_steps", "keep_last", "resume", "log_every_n_steps"),
        *("progress", "report", "use_tensorboard", "use_wandb"),
        *("wandb_project", "wandb_run_name"),
    )
)
"""Options that may change on resume: they do not alter what is trained."""

_LAUNCH = (
    "torchrun starts the processes and tells them: torchrun --nproc_per_node N -m blip3o_fast "
    "train; batch_size counts the samples of all of them"
)
_FOLDER = "checkpoints go to --output_dir alone"
ANSWERS = {
    **dict.fromkeys(("--distributed", "--world_size", "--rank", "--master_port"), _LAUNCH),
    "--fsdp_sharding_strategy": "--parallel fsdp shards like FULL_SHARD, ddp not at all",
    "--fsdp_mixed_precision": "--precision bf16 is what it means",
    "--fsdp_cpu_offload": "nothing is offloaded; --gradient_checkpointing saves memory",
    **dict.fromkeys(("--temp_checkpoint_dir", "--auto_detect_temp_dir"), _FOLDER),
    "--keep_local_checkpoints": "--keep_last is what it means",
    "--save_to_temp_every_n_steps": "--save_every_n_steps is the nearest",
    "--max_batches_per_epoch": "--max_steps ends a run early",
    "--progress_tracking": "--progress is what it means",
}
"""Flags of the published ``train_dit_distributed.py`` that ``train`` has under other names."""


@dataclass(frozen=True)
class TrainingOptions:
    """What to train, on what, for how long and how.

    Attributes:
        chunked_embeddings_dir: folder of embedding shards with a manifest.json.
        output_dir: folder of the run: checkpoints, metrics, summary.

    Attributes: Data
        max_shards: use the first so many shards only; None: all.
        heldout_fraction: share of source photos kept from training for validation; None: the
            manifest's.
        simple_scale_factor: training multiplies the targets by this and generate divides by it;
            auto: 1 / their standard deviation.
        num_workers: threads that read ahead; 0 counts as 1.
        prefetch: batches read ahead, in device memory.

    Attributes: Model
        model_size: preset of sizes.
        training_mode: patch tokens alone, or a CLS token first.
        conventions: time axis, signs and rotary layout; published reproduces the published code.
        init_from: checkpoint to start from; its configuration replaces all model options.
        hidden_size: width of the model; None: the preset's.
        num_hidden_layers: blocks; None: the preset's.
        num_attention_heads: query heads; None: the preset's.
        num_key_value_heads: key and value heads; None: the preset's.
        intermediate_size: inner width of the MLP; None: the preset's.
        eva_embedding_size: width of the condition; None: the data's.
        clip_embedding_size: width of the targets; None: the data's.
        grid: patches as depth height width; None: the data's.
        use_3d_rope: rotary positions on the 3-D grid of patches; off: 1-D rotary positions and a
            learned table.
        rope_theta: longest rotary period over 2 pi, in positions.
        use_sandwich_norm: normalise the output of each branch as well as its input.
        use_eva_adapter: gated MLP as adapter of the condition; off: one linear map.
        eva_adapter_layers: layers of the adapter's MLP.
        eva_adapter_dropout: dropout probability in the adapter.
        dropout_prob: dropout probability on the output of each MLP.
        attention_dropout: dropout probability on attention weights.
        layer_scale_init_value: initial value of the layer scales; 0: no layer scales.
        initializer_range: standard deviation of initial weights; None: the preset's.

    Attributes: Loss
        velocity_weight: weight of the velocity term.
        semantic_weight: weight of the squared error of the clean estimate.
        cosine_weight: weight of the token-wise cosine of the clean estimate.
        consistency_weight: weight of the image-wise cosine of the clean estimate.
        use_timestep_weighting: compute the semantic and consistency terms for t > 0.5 only; None:
            only with conventions=published.
        time_distribution: distribution of training times; beta is Beta(1/2, 1/2).
        zero_time_fraction: share of the samples that are at t = 0 instead, where the velocity leads
            to the conditional mean; 1: plain regression, whose model translates in one evaluation
            and cannot sample.
        condition_dropout: probability of replacing the condition by zeros; guidance needs more than
            0.

    Attributes: Optimisation
        batch_size: samples per optimizer step, over all processes and micro-batches.
        num_epochs: passes over the training samples.
        max_steps: optimizer steps, instead of num_epochs.
        learning_rate: peak rate of AdamW.
        warmup_steps: steps of warm-up, from a tenth of the learning rate to all of it; None: a
            tenth of the run, at most 100.
        weight_decay: decay of matrices; norms, biases, layer scales and positions have none.
        adam_beta1: decay of the first moment.
        adam_beta2: decay of the second moment.
        adam_epsilon: number added to the root of the second moment.
        max_grad_norm: larger gradients are scaled down to this global norm; 0: no clipping.
        adaptive_grad_clipping: halve max_grad_norm while the mean of the last ten norms is more
            than twice as large.
        ema_decay: decay of the moving average of the weights, which is validated and saved; 0: off.
        gradient_accumulation_steps: micro-batches that a step's samples are cut into; batch_size
            does not change.
        optimizer: AdamW: fused on CUDA and foreach on CPU (auto), or NVIDIA apex FusedAdam.
        max_nonfinite_steps: consecutive steps that may be skipped for NaN or Inf gradients.
        seed: decides initial weights, order of samples, times and noise.

    Attributes: Execution
        device: device to train on; auto: cuda if there is a GPU.
        precision: dtype of autocast; auto: bf16 on CUDA, fp32 on CPU.
        fp16: same as precision=fp16, under its published name.
        gradient_checkpointing: recompute each block in the backward pass to save memory.
        compile: apply torch.compile to the model.
        compile_mode: mode of torch.compile; reduce-overhead replays CUDA graphs.
        parallel: how the processes of torchrun hold the model: replicas (auto, ddp) or sharded
            parameters (fsdp).
        deterministic: fail at operations that vary from run to run.

    Attributes: Validation
        eval_every_n_steps: steps between validations; the last step is always followed by one.
        eval_num_samples: most held-out samples per validation.
        eval_inference_steps: sampler steps of a validation.
        use_heun_inference: validate with Heun's method; off: Euler's.
        eval_batch_size: samples per batch of a validation; None: as in training.
        best_metric: metric that decides which checkpoint is best.

    Attributes: Checkpoints and records
        save_every_n_steps: steps between periodic checkpoints.
        keep_last: number of newest checkpoints to keep, beside the best.
        resume: continue from the newest checkpoint in output_dir.
        log_every_n_steps: steps between printed lines, and on CUDA between records.
        progress: show a progress bar, or plain lines when not on a terminal.
        report: write report.html when training ends or stops.
        use_tensorboard: also log to TensorBoard, in output_dir.
        use_wandb: also log to Weights & Biases.
        wandb_project: project on Weights & Biases.
        wandb_run_name: name of the run on Weights & Biases; None: theirs.

    Raises:
        OptionError: naming the option, what was expected and what came.
    """

    chunked_embeddings_dir: str
    output_dir: str

    # Data
    max_shards: Count | None = None
    heldout_fraction: Share | None = None
    simple_scale_factor: Positive | Literal["auto"] = 1.0
    num_workers: Index = 2
    prefetch: Count = 4

    # Model
    model_size: Literal["tiny", "small", "base", "large"] = "base"
    training_mode: Literal["patch_only", "cls_patch"] = "patch_only"
    conventions: Literal["consistent", "published"] = "consistent"
    init_from: str | None = None
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    intermediate_size: int | None = None
    eva_embedding_size: int | None = None
    clip_embedding_size: int | None = None
    grid: tuple[int, int, int] | None = None
    use_3d_rope: bool = True
    rope_theta: Positive = 10000.0
    use_sandwich_norm: bool = True
    use_eva_adapter: bool = True
    eva_adapter_layers: int = 6
    eva_adapter_dropout: float = 0.1
    dropout_prob: float = 0.0
    attention_dropout: float = 0.0
    layer_scale_init_value: float = 0.1
    initializer_range: float | None = None

    # Loss
    velocity_weight: Amount = 1.0
    semantic_weight: Amount = 0.5
    cosine_weight: Amount = 0.2
    consistency_weight: Amount = 0.3
    use_timestep_weighting: bool | None = None
    time_distribution: Literal["beta", "uniform", "logit_normal"] = "beta"
    zero_time_fraction: Fraction = 0.0
    condition_dropout: Share = 0.0

    # Optimisation
    batch_size: Count = 8
    num_epochs: Count = 10
    max_steps: Count | None = None
    learning_rate: Positive = 1e-4
    warmup_steps: Index | None = None
    weight_decay: Amount = 0.01
    adam_beta1: Share = 0.9
    adam_beta2: Share = 0.999
    adam_epsilon: Positive = 1e-8
    max_grad_norm: Amount = 1.0
    adaptive_grad_clipping: bool = True
    ema_decay: Share = 0.0
    gradient_accumulation_steps: Count = 1
    optimizer: Literal["auto", "fused", "foreach", "apex"] = "auto"
    max_nonfinite_steps: Count = 10
    seed: Annotated[int, Range(0, 2**63)] = 0

    # Execution
    device: DeviceName = "auto"
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    fp16: bool = False
    gradient_checkpointing: bool = False
    compile: bool = False
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = "default"
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    deterministic: bool = False

    # Validation
    eval_every_n_steps: Count = 50
    eval_num_samples: Count = 100
    eval_inference_steps: Count = 50
    use_heun_inference: bool = True
    eval_batch_size: Count | None = None
    best_metric: Literal["token_cosine", "image_cosine"] = "token_cosine"

    # Checkpoints and records
    save_every_n_steps: Count = 500
    keep_last: Count = 3
    resume: bool = True
    log_every_n_steps: Count = 10
    progress: bool = True
    report: bool = True
    use_tensorboard: bool = False
    use_wandb: bool = False
    wandb_project: str = "blip3o-fast"
    wandb_run_name: str | None = None

    def __post_init__(self) -> None:
        for name in ("chunked_embeddings_dir", "output_dir", "init_from"):
            if isinstance(getattr(self, name), Path):
                object.__setattr__(self, name, str(getattr(self, name)))
        check(self, error=OptionError)
        if self.fp16 and self.precision not in ("auto", "fp16"):
            raise OptionError(
                f"precision: expected fp16 beside the flag fp16, got {self.precision}"
            )

    @property
    def loss_weights(self) -> tuple[float, float, float, float]:
        """Weights of the velocity, semantic, cosine and consistency terms."""
        return (
            self.velocity_weight,
            self.semantic_weight,
            self.cosine_weight,
            self.consistency_weight,
        )

    def replace(self, **changes: Any) -> "TrainingOptions":
        """A copy with some options changed."""
        check_names(TrainingOptions, changes, "option", OptionError)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; ``from_dict`` reads it back."""
        return {**dataclasses.asdict(self), "grid": list(self.grid) if self.grid else None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainingOptions":
        """Read options from JSON values.

        Raises:
            OptionError: on an unknown name, with the nearest known one, or a missing required one.
        """
        return from_json(cls, dict(values), "options", OptionError)

    def changes(self, saved: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Options that would alter a run saved with ``saved``: name to (saved, mine).

        An option that the saved run did not know yet had the default.
        """
        mine = self.to_dict()
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        before = {name: saved.get(name, defaults[name]) for name in mine if name not in FREE}
        return {name: (old, mine[name]) for name, old in before.items() if old != mine[name]}


def read_options_file(path: str | Path) -> dict[str, Any]:
    """Options from a JSON or TOML file, as ``--config`` and ``options.json`` hold them."""
    path = Path(path)
    try:
        with reading(path, "options in JSON or TOML", OptionError):
            text = path.read_text(encoding="utf-8")
            values = tomllib.loads(text) if path.suffix == ".toml" else parse_json(text)
    except OSError as error:
        raise OptionError(f"{path}: cannot read the options: {error.strerror}") from None
    if not isinstance(values, dict):
        raise OptionError(f"{path}: expected an object of options, got {type(values).__name__}")
    check_names(TrainingOptions, values, "option", OptionError)
    return values


@dataclass(frozen=True)
class TrainFlags:
    """What the command takes beside the options of the run.

    Attributes:
        config: JSON or TOML file of options; flags override it.
        print_config: print all options as JSON, and stop.
        dry_run: check everything, print the plan, and stop.
    """

    config: Annotated[str | None, Flag("FILE")] = None
    print_config: bool = False
    dry_run: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``train``."""
    add_flags(parser, TrainFlags)
    add_flags(parser, TrainingOptions, partial=True)
