"""Every option of a training run, in one frozen record.

The record is the single source of the command line: a field's name is its flag, its type says what
the flag takes, ``option`` carries its help. Names shared with the published ``train_dit.py`` keep
their meaning.
"""

import dataclasses
import difflib
import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from blip3o_fast.errors import OptionError
from blip3o_fast.training.option_types import describe, fits

FREE = "free"
"""Metadata of an option that may change on resume: it does not alter what is trained."""


def option(default: Any, text: str, *, free: bool = False) -> Any:
    """A field with its default and its help; ``free`` ones may change when a run resumes."""
    return dataclasses.field(default=default, metadata={"help": text, FREE: free})


def _required(text: str) -> Any:
    return dataclasses.field(metadata={"help": text, FREE: True})


@dataclass(frozen=True)
class TrainingOptions:
    """What to train, on what, for how long and how.

    ``help_of`` gives the meaning and unit of each field. None leaves the choice to what it says.

    Raises:
        OptionError: naming the option, what was expected and what came.
    """

    chunked_embeddings_dir: str = _required("folder of embedding shards with a manifest.json")
    output_dir: str = _required("folder of the run: checkpoints, metrics, summary")

    # Data
    max_shards: int | None = option(None, "use the first so many shards only; None: all")
    heldout_fraction: float | None = option(
        None, "share of source photos kept from training for validation; None: the manifest's"
    )
    simple_scale_factor: float | Literal["auto"] = option(
        1.0, "targets are multiplied by this, generate divides by it; auto: 1 / their deviation"
    )
    num_workers: int = option(2, "threads that read ahead; 0 counts as 1", free=True)
    prefetch: int = option(4, "batches read ahead, in device memory", free=True)

    # Model
    model_size: Literal["tiny", "small", "base", "large"] = option("base", "preset of sizes")
    training_mode: Literal["patch_only", "cls_patch"] = option(
        "patch_only", "patch tokens alone, or a CLS token first"
    )
    conventions: Literal["consistent", "published"] = option(
        "consistent", "time axis, signs and rotary layout; published reproduces the published code"
    )
    init_from: str | None = option(
        None, "start from the weights of this checkpoint, which also brings all model options"
    )
    hidden_size: int | None = option(None, "width of the model; None: the preset's")
    num_hidden_layers: int | None = option(None, "blocks; None: the preset's")
    num_attention_heads: int | None = option(None, "query heads; None: the preset's")
    num_key_value_heads: int | None = option(None, "key and value heads; None: the preset's")
    intermediate_size: int | None = option(None, "inner width of the MLP; None: the preset's")
    eva_embedding_size: int | None = option(None, "width of the condition; None: the data's")
    clip_embedding_size: int | None = option(None, "width of the targets; None: the data's")
    grid: tuple[int, int, int] | None = option(
        None, "patches as depth height width; None: the data's"
    )
    use_3d_rope: bool = option(True, "rotary positions on the grid; off: 1-D and a learned table")
    rope_theta: float = option(10000.0, "longest rotary period over 2 pi, in positions")
    use_sandwich_norm: bool = option(True, "norm each branch's output as well as its input")
    use_eva_adapter: bool = option(True, "gated MLP adapter of the condition; off: one linear map")
    eva_adapter_layers: int = option(6, "layers of the adapter's MLP")
    eva_adapter_dropout: float = option(0.1, "probability, in the adapter")
    dropout_prob: float = option(0.0, "probability, on the output of each MLP")
    attention_dropout: float = option(0.0, "probability, on attention weights")
    layer_scale_init_value: float = option(0.1, "initial layer scale; 0: no layer scales")
    initializer_range: float | None = option(
        None, "deviation of initial weights; None: the preset's"
    )

    # Loss
    velocity_weight: float = option(1.0, "weight of the velocity term")
    semantic_weight: float = option(0.5, "weight of the squared error of the clean estimate")
    cosine_weight: float = option(0.2, "weight of the token-wise cosine of the clean estimate")
    consistency_weight: float = option(0.3, "weight of the image-wise cosine of the clean estimate")
    use_timestep_weighting: bool | None = option(
        None, "semantic and consistency terms over t > 0.5 only; None: if conventions=published"
    )
    time_distribution: Literal["beta", "uniform", "logit_normal"] = option(
        "beta", "distribution of training times; beta is Beta(1/2, 1/2)"
    )
    condition_dropout: float = option(
        0.0, "probability of an all-zero condition; guidance needs some"
    )

    # Optimisation
    batch_size: int = option(8, "samples an optimizer step, over all processes and micro-batches")
    num_epochs: int = option(10, "passes over the training samples")
    max_steps: int | None = option(None, "optimizer steps, instead of num_epochs")
    learning_rate: float = option(1e-4, "peak rate of AdamW")
    warmup_steps: int | None = option(
        None, "steps from 0.1 of the rate to all of it; None: a tenth of the run, at most 100"
    )
    weight_decay: float = option(0.01, "on matrices; norms, biases, scales, positions have none")
    adam_beta1: float = option(0.9, "decay of the first moment")
    adam_beta2: float = option(0.999, "decay of the second moment")
    adam_epsilon: float = option(1e-8, "added to the root of the second moment")
    max_grad_norm: float = option(1.0, "bound on the global gradient norm; 0: no clipping")
    adaptive_grad_clipping: bool = option(
        True, "halve the bound while the last ten norms average more than twice it"
    )
    ema_decay: float = option(
        0.0, "of an average of the weights, used to validate and save; 0: off"
    )
    gradient_accumulation_steps: int = option(
        1, "micro-batches that a step's samples are cut into; batch_size does not change", free=True
    )
    optimizer: Literal["auto", "fused", "foreach", "apex"] = option(
        "auto", "AdamW: fused on CUDA and foreach on CPU (auto), or NVIDIA apex FusedAdam"
    )
    max_nonfinite_steps: int = option(
        10, "consecutive steps skipped for NaN or Inf gradients before the run stops", free=True
    )
    seed: int = option(0, "of initial weights, order of samples, times and noise")

    # Execution
    device: Literal["auto", "cpu", "cuda"] = option(
        "auto", "auto: cuda where there is one", free=True
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = option(
        "auto", "of autocast; auto: bf16 on CUDA, fp32 on CPU"
    )
    fp16: bool = option(False, "the published flag for precision=fp16")
    gradient_checkpointing: bool = option(
        False, "recompute each block in the backward pass to save memory", free=True
    )
    compile: bool = option(False, "torch.compile the model", free=True)
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = option(
        "default", "of torch.compile; reduce-overhead replays CUDA graphs", free=True
    )
    parallel: Literal["auto", "ddp", "fsdp"] = option(
        "auto", "under torchrun: replicas (auto, ddp) or sharded parameters (fsdp)"
    )
    deterministic: bool = option(False, "refuse operations that vary from run to run", free=True)

    # Validation
    eval_every_n_steps: int = option(50, "steps between validations")
    eval_num_samples: int = option(100, "held-out samples of a validation, at most")
    eval_inference_steps: int = option(50, "sampler steps of a validation")
    use_heun_inference: bool = option(True, "validate with Heun's method; off: Euler's")
    eval_batch_size: int | None = option(None, "samples at once; None: as in training", free=True)
    best_metric: Literal["token_cosine", "image_cosine"] = option(
        "token_cosine", "what the best checkpoint is best in"
    )

    # Checkpoints and records
    save_every_n_steps: int = option(500, "steps between periodic checkpoints", free=True)
    keep_last: int = option(3, "newest checkpoints kept, beside the best", free=True)
    resume: bool = option(True, "go on from the newest checkpoint in output_dir", free=True)
    log_every_n_steps: int = option(10, "steps between records on CUDA, between lines", free=True)
    progress: bool = option(True, "progress bar, or plain lines when not on a terminal", free=True)
    report: bool = option(True, "write report.html when training ends or stops", free=True)
    use_tensorboard: bool = option(False, "also log to TensorBoard, in output_dir", free=True)
    use_wandb: bool = option(False, "also log to Weights & Biases", free=True)
    wandb_project: str = option("blip3o-fast", "project of Weights & Biases", free=True)
    wandb_run_name: str | None = option(
        None, "run name of Weights & Biases; None: theirs", free=True
    )

    def __post_init__(self) -> None:
        for name in ("chunked_embeddings_dir", "output_dir", "init_from"):
            if isinstance(getattr(self, name), Path):
                object.__setattr__(self, name, str(getattr(self, name)))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not fits(value, field.type):
                raise OptionError(f"{field.name}: expected {describe(field.type)}, got {value!r}")
        if self.fp16 and self.precision not in ("auto", "fp16"):
            raise OptionError(
                f"precision: expected fp16 beside the flag fp16, got {self.precision}"
            )
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if isinstance(value, int | float) and not low <= value < high:
                raise OptionError(f"{name}: expected {_interval(low, high)}, got {value}")
        for name in ("learning_rate", "simple_scale_factor", "rope_theta", "adam_epsilon"):
            if getattr(self, name) == 0:
                raise OptionError(f"{name}: expected more than 0, got 0")

    @property
    def loss_weights(self) -> tuple[float, float, float, float]:
        """Of the velocity, semantic, cosine and consistency terms."""
        return (
            self.velocity_weight,
            self.semantic_weight,
            self.cosine_weight,
            self.consistency_weight,
        )

    def replace(self, **changes: Any) -> "TrainingOptions":
        """A copy with some options changed."""
        check_names(changes)
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
        check_names(values)
        known = dict(values)
        if isinstance(known.get("grid"), list):
            known["grid"] = tuple(known["grid"])
        for name in ("chunked_embeddings_dir", "output_dir"):
            if name not in known:
                raise OptionError(f"{name}: expected a folder, got none")
        return cls(**known)

    def changes(self, saved: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Options that would alter a run saved with ``saved``: name to (saved, mine)."""
        mine = self.to_dict()
        names = [f.name for f in dataclasses.fields(self) if not f.metadata[FREE]]
        return {n: (saved.get(n), mine[n]) for n in names if saved.get(n) != mine[n]}


_COUNT = (1, math.inf)
_SHARE = (0, 1)
_WEIGHT = (0, math.inf)
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("batch_size", "num_epochs", "max_steps", "max_shards", "prefetch"), _COUNT),
    **dict.fromkeys(("eval_every_n_steps", "eval_num_samples", "eval_inference_steps"), _COUNT),
    **dict.fromkeys(("eval_batch_size", "save_every_n_steps", "log_every_n_steps"), _COUNT),
    **dict.fromkeys(("gradient_accumulation_steps", "keep_last", "max_nonfinite_steps"), _COUNT),
    **dict.fromkeys(("num_workers", "warmup_steps"), _WEIGHT),
    **dict.fromkeys(("velocity_weight", "semantic_weight", "cosine_weight"), _WEIGHT),
    **dict.fromkeys(("consistency_weight", "weight_decay", "max_grad_norm"), _WEIGHT),
    **dict.fromkeys(("learning_rate", "simple_scale_factor", "adam_epsilon"), _WEIGHT),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "ema_decay", "condition_dropout"), _SHARE),
    "heldout_fraction": _SHARE,
    "seed": (0, 2**63),
}


def option_fields() -> tuple[dataclasses.Field[Any], ...]:
    """The fields of ``TrainingOptions`` in order."""
    return dataclasses.fields(TrainingOptions)


def help_of(name: str) -> str:
    """What an option means, with its unit."""
    return TrainingOptions.__dataclass_fields__[name].metadata["help"]


def check_names(values: Mapping[str, Any]) -> None:
    """Raise ``OptionError`` for an unknown option, naming the nearest known one."""
    names = [field.name for field in option_fields()]
    for name in values:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise OptionError(f"unknown option {name!r}{hint}")


def read_options_file(path: str | Path) -> dict[str, Any]:
    """Options from a JSON or TOML file, as ``--config`` and ``options.json`` hold them."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise OptionError(f"{path}: cannot read the options: {error.strerror}") from None
    except ValueError as error:
        raise OptionError(f"{path}: expected options in JSON or TOML: {error}") from None
    if not isinstance(values, dict):
        raise OptionError(f"{path}: expected an object of options, got {type(values).__name__}")
    check_names(values)
    return values


def _interval(low: float, high: float) -> str:
    return f"at least {low:g}" + (f" and below {high:g}" if math.isfinite(high) else "")
