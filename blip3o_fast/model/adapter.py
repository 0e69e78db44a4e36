"""The EVA adapter: a gated pair of paths from the condition's width to the model's.

Widths fall evenly from E to D (base: 4096, 3541, 2986, 2432, 1877, 1322, 768). Most are not
multiples of 8, which would push 16-bit GEMMs off the tensor cores' fast path, so on CUDA the rows
are padded with zeros; parameters keep the published shapes.
"""

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from blip3o_fast import ops
from blip3o_fast.config import DiTConfig
from blip3o_fast.ops import ImplTable

CUDA_WIDTH_MULTIPLE = 64
"""One 128-byte line of 16-bit numbers, so that every row starts on a line."""


class EVAAdapter(nn.Module):
    """``g * mlp(eva) + (1 - g) * linear(eva)`` with ``g = sigmoid(gate(mlp(eva)))``."""

    def __init__(self, config: DiTConfig, impls: ImplTable) -> None:
        super().__init__()
        E, D, layers = config.eva_embedding_size, config.hidden_size, config.eva_adapter_layers
        widths = [int(width) for width in np.linspace(E, D, layers + 1)]
        self.impls = impls
        self.adaptation_layers = nn.Sequential()
        for narrow, wide in zip(widths[1:], widths, strict=False):
            self.adaptation_layers.extend(
                (
                    nn.Linear(wide, narrow),
                    nn.LayerNorm(narrow),
                    nn.GELU(),
                    nn.Dropout(config.eva_adapter_dropout),
                )
            )
        self.residual_proj = nn.Linear(E, D)
        self.gate = nn.Sequential(nn.Linear(D, D), nn.Sigmoid())
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, gain=0.1)
                nn.init.zeros_(module.bias)

    def forward(self, eva: Tensor) -> Tensor:
        """``[B, M, E]`` to ``[B, M, D]``."""
        multiple = width_multiple(eva)
        layers = list(self.adaptation_layers)
        D = self.residual_proj.out_features
        h = eva
        for linear, norm, dropout in zip(layers[0::4], layers[1::4], layers[3::4], strict=True):
            assert isinstance(linear, nn.Linear) and isinstance(norm, nn.LayerNorm)
            h = padded_linear(h, linear, multiple)
            h = ops.adapter_norm(
                h, norm.weight, norm.bias, eps=norm.eps, impl=self.impls.adapter_norm
            )
            h = dropout(h)
        adapted = h[..., :D]
        return ops.adapter_mix(
            self.gate[0](adapted), adapted, self.residual_proj(eva), impl=self.impls.adapter_mix
        )


def width_multiple(x: Tensor) -> int:
    """What the widths of activations are rounded up to on the device of ``x``."""
    return CUDA_WIDTH_MULTIPLE if x.is_cuda else 1


def padded_linear(x: Tensor, linear: nn.Linear, multiple: int) -> Tensor:
    """``linear`` with the output rounded up to a multiple and the input's padding ignored."""
    columns = x.shape[-1] - linear.in_features
    rows = -linear.out_features % multiple
    weight = F.pad(linear.weight, (0, columns, 0, rows)) if columns or rows else linear.weight
    return F.linear(x, weight, F.pad(linear.bias, (0, rows)) if rows else linear.bias)
