"""Close one residual sub-layer and open the next, in one op."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from blip3o_fast import reference
from blip3o_fast.ops import _aten
from blip3o_fast.ops._cuda import norm_refusal
from blip3o_fast.ops._dispatch import Impl
from blip3o_fast.ops._record import Arguments, Backward, Op
from blip3o_fast.ops._registration import register
from blip3o_fast.ops._specimens import Sizes
from blip3o_fast.reference import Modulation

ABSENT = (None,) * 4
"""The four tensors of a missing modulation."""


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
        x: residual stream ``[B, N, D]``, any strides.
        y: output of the sub-layer's branch, ``[B, N, D]``, any strides.
        layer_scale: ``[D]``, or None for 1.
        post: norm and modulation of the branch, or None to add it as it is (plain pre-norm).
        pre: norm and modulation that open the next sub-layer, or None at the end of a stack.
        eps: added to every mean square.
        impl: None chooses by device.

    Returns:
        ``(x_out, h)``, both ``[B, N, D]`` in the dtype of ``x``; ``h`` is None when ``pre`` is.
        Differentiable once in every tensor.
    """
    x_out, h = SANDWICH_JOIN(x, y, layer_scale, *(post or ABSENT), *(pre or ABSENT), eps, impl=impl)
    return x_out, None if pre is None else h


def _with_modulations(join: Callable[..., Any]) -> Callable[..., Any]:
    """``join`` as a function of the op's flat arguments."""

    def flat(x: Tensor, y: Tensor, layer_scale: Tensor | None, *rest: Any) -> Any:
        *norms, eps = rest
        post, pre = (None if u[0] is None else Modulation(*u) for u in (norms[:4], norms[4:]))
        return join(x, y, layer_scale, post, pre, eps)

    return flat


def _specimens(sizes: Sizes) -> list[Arguments]:
    x, y, scale = sizes.rows(sizes.width), sizes.rows(sizes.width), sizes.weight(sizes.width)
    post, pre, eps = sizes.modulation(), sizes.modulation(), 1e-6
    return [
        (x, y, scale, *post, *pre, eps),
        (x, y, None, *post, *pre, eps),
        (x, y, scale, *ABSENT, *pre, eps),
        (x, y, None, *ABSENT, *pre, eps),
        (x, y, scale, *post, *ABSENT, eps),
    ]


def _fake(x: Tensor, y: Tensor, layer_scale: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    del y, layer_scale
    *norms, _ = rest
    return x.new_empty(x.shape), x.new_empty(0 if norms[4] is None else x.shape)


_NORM = "Tensor? {0}w1, Tensor? {0}w2, Tensor? {0}shift, Tensor? {0}scale"
_GIVEN = f"Tensor? layer_scale, {_NORM.format('post_')}, {_NORM.format('pre_')}, float eps"
_AXES = {"w1": "D", "w2": "D", "shift": "B D", "scale": "B D"}

SANDWICH_JOIN = register(
    Op(
        name="sandwich_join",
        schema=f"(Tensor x, Tensor y, {_GIVEN}) -> (Tensor, Tensor)",
        axes={
            **{"x": "B N D", "y": "B N D", "layer_scale": "D"},
            **{f"{norm}.{name}": axes for norm in ("post", "pre") for name, axes in _AXES.items()},
        },
        reference=_with_modulations(reference.sandwich_join),
        specimens=_specimens,
        fake=_fake,
        backward=Backward(
            schema=f"(Tensor? dx_out, Tensor? dh, Tensor x_out, Tensor y, {_GIVEN}, "
            f"bool parameters) -> ({', '.join(['Tensor'] * 11)})",
            saved=lambda arguments, results: (results[0], *arguments[1:]),
            results=2,
        ),
        quantised=True,
        aten=_with_modulations(_aten.sandwich_join),
        cuda=norm_refusal,
    )
)
