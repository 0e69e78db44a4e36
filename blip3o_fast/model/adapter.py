"""The EVA adapter: a gated pair of paths from the condition's width to the model's.

Widths fall evenly from E to D (base: 4096, 3541, 2986, 2432, 1877, 1322, 768). Most are not
multiples of 8, and 16-bit GEMMs of such widths are slow on tensor cores. On CUDA the rows are
therefore padded with zeros. Parameters keep the published shapes.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip3o_fast import ops
from blip3o_fast.config import DiTConfig
from blip3o_fast.model.layers import is_plain
from blip3o_fast.ops import ImplTable

CUDA_WIDTH_MULTIPLE = 64
"""128 bytes of 16-bit numbers, so that every row starts on a cache line."""


def adapt(
    eva: Tensor,
    layers: Iterable[Callable[[Tensor], Tensor]],
    gate: Callable[[Tensor], Tensor],
    residual: Callable[[Tensor], Tensor],
    width: int,
    impls: ImplTable,
) -> Tensor:
    """``g * mlp(eva) + (1 - g) * residual(eva)`` with ``g = sigmoid(gate(mlp(eva)))``."""
    h = eva
    for layer in layers:
        h = layer(h)
    adapted = h[..., :width]
    return ops.adapter_mix(gate(adapted), adapted, residual(eva), impl=impls.adapter_mix)


def adapter_layer(
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    impls: ImplTable,
    dropout: float = 0.0,
) -> Tensor:
    """``dropout(gelu(norm(linear(h))))`` of padded rows; the norm counts the true width only."""
    h = F.linear(h, weight, bias)
    seed = torch.randint(2**63 - 1, (1,), device=h.device) if dropout else None
    return ops.adapter_norm(
        h, norm_weight, norm_bias, eps=eps, dropout=dropout, seed=seed, impl=impls.adapter_norm
    )


class EVAAdapter(nn.Module):
    """The adapter under the published parameter names."""

    def __init__(self, config: DiTConfig, impls: ImplTable) -> None:
        super().__init__()
        E, D = config.eva_embedding_size, config.hidden_size
        self.widths = adapter_widths(config)
        self.impls = impls
        self.adaptation_layers = nn.Sequential()
        for narrow, wide in zip(self.widths[1:], self.widths, strict=False):
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

    def layers(self) -> list[list[nn.Module]]:
        """The Linear, LayerNorm, GELU and Dropout of every layer."""
        modules = list(self.adaptation_layers)
        return [modules[i : i + 4] for i in range(0, len(modules), 4)]

    def forward(self, eva: Tensor) -> Tensor:
        """``[B, M, E]`` to ``[B, M, D]``."""
        multiple = width_multiple(eva)

        def call(layer: list[nn.Module], width: int) -> Callable[[Tensor], Tensor]:
            return lambda h: self._layer(h, layer, width, multiple)

        return adapt(
            eva,
            [call(layer, width) for layer, width in zip(self.layers(), self.widths, strict=False)],
            self.gate[0],
            self.residual_proj,
            self.widths[-1],
            self.impls,
        )

    def _layer(self, h: Tensor, layer: list[nn.Module], width: int, multiple: int) -> Tensor:
        linear, norm, gelu, dropout = layer
        kinds = (nn.Linear, nn.LayerNorm, nn.GELU, nn.Dropout)
        if not all(is_plain(module, kind) for module, kind in zip(layer, kinds, strict=True)):
            return dropout(gelu(norm(linear(h[..., :width]))))
        assert isinstance(linear, nn.Linear) and isinstance(norm, nn.LayerNorm)
        assert isinstance(dropout, nn.Dropout)
        weight, bias = padded(linear.weight, linear.bias, h.shape[-1], multiple)
        p = dropout.p if dropout.training else 0.0
        return adapter_layer(h, weight, bias, norm.weight, norm.bias, norm.eps, self.impls, p)


def adapter_widths(config: DiTConfig) -> list[int]:
    """The widths before the first layer and after each layer, from E to D."""
    ends = config.eva_embedding_size, config.hidden_size
    return [int(width) for width in np.linspace(*ends, config.eva_adapter_layers + 1)]


def width_multiple(x: Tensor) -> int:
    """The multiple to which widths of activations are rounded up on the device of ``x``."""
    return CUDA_WIDTH_MULTIPLE if x.is_cuda else 1


def padded(weight: Tensor, bias: Tensor, width: int, multiple: int) -> tuple[Tensor, Tensor]:
    """Weight and bias, padded with zeros: for rows of ``width``, to outputs of a multiple."""
    columns, rows = width - weight.shape[1], -weight.shape[0] % multiple
    if columns or rows:
        weight = F.pad(weight, (0, columns, 0, rows))
    return weight, F.pad(bias, (0, rows)) if rows else bias
