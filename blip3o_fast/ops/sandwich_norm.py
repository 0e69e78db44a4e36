"""RMSNorm, then AdaLN, which has an RMSNorm of its own, in one op."""

from torch import Tensor

from blip3o_fast import reference
from blip3o_fast.ops import _aten
from blip3o_fast.ops._cuda import norm_refusal
from blip3o_fast.ops._dispatch import Impl
from blip3o_fast.ops._record import Backward, Op
from blip3o_fast.ops._registration import register


def sandwich_norm(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    eps: float,
    impl: Impl | None = None,
) -> Tensor:
    """``rms(rms(x; w1); w2) * (1 + scale) + shift``.

    Args:
        x: ``[B, N, D]``, any strides.
        w1, w2: ``[D]``, the weights of the first norm and of the AdaLN's norm.
        shift, scale: ``[B, D]``, the same for all tokens. Chunks of one ``[B, 2D]`` are not copied.
        eps: added to both mean squares.
        impl: None chooses by device.

    Returns:
        ``[B, N, D]`` in the dtype of ``x``. Differentiable once in every tensor.
    """
    return SANDWICH_NORM(x, w1, w2, shift, scale, eps, impl=impl)


_GIVEN = "Tensor x, Tensor w1, Tensor w2, Tensor shift, Tensor scale, float eps"

SANDWICH_NORM = register(
    Op(
        name="sandwich_norm",
        schema=f"({_GIVEN}) -> Tensor",
        axes={"x": "B N D", "w1": "D", "w2": "D", "shift": "B D", "scale": "B D"},
        reference=reference.sandwich_norm,
        specimens=lambda sizes: [(sizes.rows(sizes.width), *sizes.modulation(), 1e-6)],
        backward=Backward(
            f"(Tensor grad, {_GIVEN}, bool parameters) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
        ),
        quantised=True,
        aten=_aten.sandwich_norm,
        cuda=norm_refusal,
    )
)
