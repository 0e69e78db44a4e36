"""The gate-up product of the MLP and its activation, for inference, by one kernel or by two."""

import torch
import torch.nn.functional as F
from torch import Tensor

from blip3o_fast import reference
from blip3o_fast.ops._dispatch import Impl, choose
from blip3o_fast.ops._record import Arguments, Op
from blip3o_fast.ops._registration import register
from blip3o_fast.ops._specimens import Sizes
from blip3o_fast.ops.swiglu import swiglu

MULTIPLE = 8
"""The kernel moves rows of D and I elements of 16 bits by TMA, whose strides are 16 bytes."""

TILES = 3
"""How many tiles the kernel can be cut into."""


def gemm_swiglu(
    x: Tensor,
    weight: Tensor,
    *,
    impl: Impl | None = None,
    swiglu_impl: Impl | None = None,
) -> Tensor:
    """``swiglu`` of ``x W^T`` (arXiv:2002.05202).

    Args:
        x: ``[B, N, D]``, any strides.
        weight: ``[2I, D]`` in the dtype of ``x``, gate in the first half.
        impl: TRITON runs one kernel that does both, for 16 bits, D and I that are multiples of 8,
            compute capability 9 or 10, and no gradient. It rounds once, two kernels round gate and
            up too. Any other runs two: the product, then ``swiglu`` by that implementation. None
            runs one kernel where that was measured to be faster, and two otherwise.
        swiglu_impl: of ``swiglu`` where two kernels run; None is ``impl``.

    Returns:
        ``[B, N, I]`` in the dtype of ``x``. Two kernels are differentiable once, one is not.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, or ``impl`` that cannot run.
    """
    if impl in (None, Impl.TRITON) and choose(GEMM_SWIGLU, impl, x) is Impl.TRITON:
        unfit = _unfit(x, weight)
        if not unfit:
            return GEMM_SWIGLU(x, weight, None, impl=Impl.TRITON)
        if impl is Impl.TRITON:
            raise ValueError(
                f"impl=TRITON: {unfit}; pass impl=Impl.REFERENCE for two kernels, the product and "
                "swiglu"
            )
    return swiglu(F.linear(x, weight), impl=swiglu_impl or impl)


def _unfit(x: Tensor, weight: Tensor) -> str | None:
    """Why the one kernel cannot compute this, or None."""
    if weight.shape[-1] % MULTIPLE or weight.shape[0] % (2 * MULTIPLE):
        return (
            f"the kernel takes multiples of {MULTIPLE} as D and I, got a weight [2I, D] of "
            f"{list(weight.shape)}"
        )
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return "the kernel has no backward: expected torch.no_grad()"
    return None


def _triton_refusal(x: Tensor) -> str | None:
    if x.dtype not in (torch.float16, torch.bfloat16):
        return "the kernel takes float16 and bfloat16"
    if x.is_cuda and (found := torch.cuda.get_device_capability(x.device))[0] not in (9, 10):
        # Without TMA Triton compiles it to loads that it does not overlap, and spills registers.
        return f"the kernel needs compute capability 9 or 10, got {found[0]}.{found[1]}"
    return None


def _require(x: Tensor, weight: Tensor, tile: int | None) -> None:
    del tile
    if len(weight) % 2:
        raise ValueError(f"weight: expected an even first axis [2I, D], got {list(weight.shape)}")
    if weight.dtype != x.dtype:
        raise ValueError(f"weight: expected {x.dtype}, the dtype of x, got {weight.dtype}")


def _specimens(sizes: Sizes) -> list[Arguments]:
    width, inner = (-(-size // MULTIPLE) * MULTIPLE for size in (sizes.width, sizes.inner))
    x, weight = sizes.rows(width), sizes.projection(2 * inner, width)
    return [(x, weight, tile) for tile in (None, *range(TILES))]


def _fake(x: Tensor, weight: Tensor, tile: int | None) -> Tensor:
    del tile
    return x.new_empty((*x.shape[:-1], weight.shape[0] // 2))


def _flops(x: Tensor, weight: Tensor, tile: int | None) -> float:
    """Two for each multiply-add."""
    del tile
    return 2.0 * x.numel() * len(weight)


GEMM_SWIGLU = register(
    Op(
        name="gemm_swiglu",
        schema="(Tensor x, Tensor weight, int? tile) -> Tensor",
        axes={"x": "B N D", "weight": "out D"},
        reference=reference.gemm_swiglu,
        specimens=_specimens,
        fake=_fake,
        require=_require,
        triton=_triton_refusal,
        combines=True,
        flops=_flops,
    )
)
