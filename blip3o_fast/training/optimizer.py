"""AdamW, its parameter groups, its learning rate, and one update.

Matrices decay (decoupled, arXiv:1711.05101); norms, biases, layer scales and the learned positions
do not. The rate is a pure function of the step::

    warm-up   peak * (0.1 + 0.9 s / w)                                  s < w
    cosine    peak * (0.01 + 0.99 (1 + cos(pi (s - w) / (T - w))) / 2)   w <= s < T
"""

import importlib
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from blip3o_fast.errors import OptionError
from blip3o_fast.options.train import TrainingOptions
from blip3o_fast.training.clipping import Clip
from blip3o_fast.training.ema import local

WARMUP_START = 0.1
FINAL_SHARE = 0.01
OptimizerKind = Literal["fused", "foreach", "apex"]


@dataclass(frozen=True)
class Schedule:
    """The learning rate of each step.

    Attributes:
        peak: the rate after warm-up.
        warmup: steps w, less than ``total``.
        total: steps T.
    """

    peak: float
    warmup: int
    total: int

    def rate(self, step: int) -> float:
        """The rate of the step that follows ``step`` others."""
        if step < self.warmup:
            return self.peak * (WARMUP_START + (1 - WARMUP_START) * step / self.warmup)
        progress = (step - self.warmup) / (self.total - self.warmup)
        cosine = (1 + math.cos(math.pi * progress)) / 2
        return self.peak * (FINAL_SHARE + (1 - FINAL_SHARE) * cosine)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters as two groups: matrices, which decay, and everything else."""
    trained = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() == 2]
    others = [p for p in trained if p.dim() != 2]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def choose_optimizer(name: str, device: torch.device) -> OptimizerKind:
    """Resolve ``auto``: fused on CUDA, foreach on a CPU."""
    if name == "apex":
        require_apex()
        if device.type != "cuda":
            raise OptionError(f"optimizer: apex expects a CUDA device, got {device}; use foreach")
        return "apex"
    if name == "auto":
        return "fused" if device.type == "cuda" else "foreach"
    assert name == "fused" or name == "foreach"
    return name


def make_optimizer(
    kind: OptimizerKind, module: nn.Module, options: TrainingOptions
) -> torch.optim.Optimizer:
    """AdamW over the parameters of ``module``."""
    groups = parameter_groups(module, options.weight_decay)
    betas = (options.adam_beta1, options.adam_beta2)
    rate, epsilon = options.learning_rate, options.adam_epsilon
    if kind == "apex":
        fused_adam = require_apex()
        return fused_adam(groups, lr=rate, betas=betas, eps=epsilon, adam_w_mode=True)
    return torch.optim.AdamW(
        groups, lr=rate, betas=betas, eps=epsilon, fused=kind == "fused", foreach=kind == "foreach"
    )


def require_apex() -> Any:
    """NVIDIA's ``FusedAdam``.

    Raises:
        OptionError: if it is absent or was built without its CUDA extension, or if the package of
            the same name on the public index, which is another project, is installed instead.
    """
    remedy = "build NVIDIA apex from source (not 'pip install apex'), or use optimizer=fused"
    try:
        fused_adam = importlib.import_module("apex.optimizers").FusedAdam
    except (ImportError, AttributeError):
        # Importing the submodule has imported the package 'apex', whichever it is.
        found = "apex" in sys.modules
        what = "a package 'apex' that is not NVIDIA's" if found else "no package 'apex'"
        raise OptionError(f"optimizer: apex expects FusedAdam, got {what}; {remedy}") from None
    try:
        importlib.import_module("amp_C")
    except ImportError:
        raise OptionError(
            f"optimizer: apex expects its CUDA extension amp_C, got a build without it; {remedy}"
        ) from None
    return fused_adam


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use ``rate`` in the next update."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def apply_gradients(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, clip: Clip
) -> None:
    """Clip and update; a step with non-finite gradients leaves weights and moments as they are.

    The fused optimizer clips and skips inside its own kernel, without another pass over the
    gradients and without waiting for the device. For the other optimizers the host decides, and
    with a loss scaler the scaler decides. Gradients must be unscaled already.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if optimizer.defaults.get("fused") and not scaler.is_enabled():
        # GradScaler's protocol for fused optimizers: gradients are divided by grad_scale, and the
        # step is skipped if found_inf is 1.
        optimizer.grad_scale = _beside(1 / clip.coefficient, parameters[0])  # pyright: ignore
        optimizer.found_inf = _beside((~clip.finite).float(), parameters[0])  # pyright: ignore
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf  # pyright: ignore
    elif scaler.is_enabled() or bool(clip.finite):
        _scale(parameters, clip.coefficient)
        scaler.step(optimizer)
    scaler.update()


def _scale(parameters: Iterable[Tensor], coefficient: Tensor) -> None:
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    torch._foreach_mul_(gradients, coefficient)  # pyright: ignore[reportPrivateImportUsage]


def _beside(x: Tensor, parameter: Tensor) -> Tensor:
    """A 0-d tensor in the form that an op on ``parameter`` accepts: replicated beside a shard."""
    if isinstance(parameter, DTensor):
        return DTensor.from_local(x, parameter.device_mesh, [Replicate()])
    return x
