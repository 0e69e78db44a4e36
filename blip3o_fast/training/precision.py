"""Arithmetic of the forward pass: autocast, and loss scaling where it is needed.

Master weights, gradients and optimizer state are fp32 throughout. fp16 has gradients as small as
6e-8 at best, so its loss is scaled by a power of two that backs off on overflow (arXiv:1710.03740);
bf16 has the range of fp32 and needs none.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from blip3o_fast.devices import DTYPES

PrecisionName = Literal["bf16", "fp16", "fp32"]


@dataclass(frozen=True)
class Precision:
    """The dtype of autocast on a type of device; fp32 means no autocast."""

    name: PrecisionName
    device_type: str

    @property
    def dtype(self) -> torch.dtype:
        """What GEMMs compute in."""
        return DTYPES[self.name]

    def autocast(self) -> torch.autocast:
        """A fresh context for one forward pass."""
        return torch.autocast(self.device_type, self.dtype, enabled=self.name != "fp32")

    def features(self, x: Tensor) -> Tensor:
        """Inputs of the network from storage: fp32, or as they are where autocast casts them.

        From 16 bits to fp32 and on to 16 bits is what one cast gives, for a third of the traffic.
        """
        return x.float() if self.name == "fp32" else x

    def scaler(self) -> torch.amp.GradScaler:
        """A loss scaler that starts at 65536; it does nothing unless the precision is fp16."""
        return torch.amp.GradScaler(self.device_type, enabled=self.name == "fp16")


def choose_precision(name: str, fp16: bool, device: torch.device) -> Precision:
    """Resolve ``auto``: bf16 on CUDA, fp32 on a CPU, unless the flag ``fp16`` is given."""
    if fp16:
        name = "fp16"
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "fp32"
    assert name == "bf16" or name == "fp16" or name == "fp32"
    return Precision(name, device.type)
