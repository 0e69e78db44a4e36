"""Inputs of the ops at any size, to test, inspect and time them on."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """Sizes, dtypes and device of specimens; the letters are those of ``blip3o_fast.axes``.

    Attributes:
        batch, tokens, width, inner, channels: B, N, D, I and C.
        heads, kv_heads, head_width: H, K and d.
        adapter, padded: true and padded width of a layer of the adapter.
        dtype: of activations.
        parameter_dtype: of weights and modulations; None is that of activations.
        device: of the tensors. ``"meta"`` takes no memory and is enough to count bytes.
    """

    batch: int = 2
    tokens: int = 3
    width: int = 8
    inner: int = 6
    channels: int = 8
    heads: int = 2
    kv_heads: int = 1
    head_width: int = 4
    adapter: int = 5
    padded: int = 8
    dtype: torch.dtype = torch.float32
    parameter_dtype: torch.dtype | None = None
    device: torch.device | str = "cpu"

    def rows(self, width: int) -> Tensor:
        """Activations ``[B, N, width]``."""
        return self._normal(self.batch, self.tokens, width, dtype=self.dtype).add_(0.5)

    def wide_rows(self, width: int) -> Tensor:
        """The same in at least fp32, like the solver's state."""
        return self._normal(self.batch, self.tokens, width, dtype=self._wide).add_(0.5)

    def weight(self, width: int) -> Tensor:
        """``[width]``, around 1."""
        return self._normal(width, dtype=self._parameter).mul_(0.3).add_(1.0)

    def projection(self, out: int, width: int) -> Tensor:
        """``[out, width]``, so that a product is about as large as its input."""
        return self._normal(out, width, dtype=self.dtype).mul_(width**-0.5)

    def modulation(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Two weights ``[D]``; shift and scale ``[B, D]``, the halves of one tensor as in AdaLN."""
        both = self._normal(self.batch, 2 * self.width, dtype=self._parameter).mul_(0.5)
        shift, scale = both.chunk(2, dim=-1)
        return self.weight(self.width), self.weight(self.width), shift, scale

    def rotation(self) -> tuple[Tensor, Tensor]:
        """cos and sin ``[N, d]`` in at least fp32. Both members of a pair have one angle."""
        shape = (self.tokens, self.head_width // 2)
        angles = torch.rand(shape, dtype=self._wide, device=self.device).mul_(2 * math.pi)
        return angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)

    def shear(self) -> tuple[Tensor, Tensor]:
        """Tables ``[N, d]`` whose halves differ, as in the published layout."""
        shape = (self.tokens, self.head_width)
        return self._normal(*shape, dtype=self._wide), self._normal(*shape, dtype=self._wide)

    def times(self) -> Tensor:
        """``[B]`` in [0, 1), in at least fp32."""
        return torch.rand(self.batch, dtype=self._wide, device=self.device)

    def seed(self) -> Tensor:
        """Of dropout: int64 ``[1]``."""
        return torch.randint(2**63 - 1, (1,), device=self.device)

    def _normal(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=self.device)

    @property
    def _wide(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def _parameter(self) -> torch.dtype:
        return self.parameter_dtype or self.dtype
