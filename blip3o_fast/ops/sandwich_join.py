"""Close one residual sub-layer and open the next, as one op."""

from torch import Tensor

from blip3o_fast import reference
from blip3o_fast.axes import check_shape
from blip3o_fast.ops._dispatch import Impl, resolve_impl
from blip3o_fast.ops.sandwich_norm import check_modulation
from blip3o_fast.reference import Modulation


def sandwich_join(
    x: Tensor,
    y: Tensor,
    layer_scale: Tensor | None,
    post: Modulation | None,
    pre: Modulation | None,
    *,
    eps: float,
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``x_out = x + norm(layer_scale * y; post)`` and ``h = norm(x_out; pre)``.

    ``norm`` is ``sandwich_norm``.

    Args:
        x: residual stream ``[B, N, D]``.
        y: output of the sub-layer's branch, ``[B, N, D]``.
        layer_scale: ``[D]``, or None for 1.
        post: norm and modulation of the branch, or None to add it as it is (plain pre-norm).
        pre: norm and modulation that open the next sub-layer, or None at the end of a stack.
        eps: added to every mean square.
        impl: None chooses by device.

    Returns:
        ``(x_out, h)``, both ``[B, N, D]`` in the dtype of ``x``; ``h`` is None when ``pre`` is.
        Differentiable once in every tensor.
    """
    check_shape("x", x, "B N D")
    B, N, D = x.shape
    check_shape("y", y, "B N D", B=B, N=N, D=D)
    if layer_scale is not None:
        check_shape("layer_scale", layer_scale, "D", D=D)
    if post is not None:
        check_modulation("post.", *post, batch=B, width=D)
    if pre is not None:
        check_modulation("pre.", *pre, batch=B, width=D)
    resolve_impl(impl, x)
    return reference.sandwich_join(x, y, layer_scale, post, pre, eps)
