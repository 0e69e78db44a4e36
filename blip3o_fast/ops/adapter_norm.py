"""LayerNorm and GELU of one adapter layer, on rows that are padded to a width that suits GEMMs."""

from torch import Tensor

from blip3o_fast import reference
from blip3o_fast.ops._dispatch import Impl
from blip3o_fast.ops._record import Arguments, Backward, Op
from blip3o_fast.ops._registration import register
from blip3o_fast.ops._specimens import Sizes


def adapter_norm(
    x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5, impl: Impl | None = None
) -> Tensor:
    """``gelu(layer_norm(x[..., :W]))``, followed by zeros in the padding ``[..., W:]``.

    The adapter's widths (3541, 2986, 1877 and 1322 for base) are not multiples of 8. 16-bit GEMMs
    of such widths are slow on tensor cores, so activations are padded. The padding of ``x`` is not
    read, and its gradient is zero.

    Args:
        x: ``[B, N, P]`` with P >= W, any strides.
        weight, bias: ``[W]``.
        eps: added to the variance.
        impl: None chooses by device.

    Returns:
        ``[B, N, P]`` in the dtype of ``x``. Differentiable once in every tensor.
    """
    return ADAPTER_NORM(x, weight, bias, eps, impl=impl)


def _require(x: Tensor, weight: Tensor, *others: object) -> None:
    del others
    if not 1 <= weight.shape[0] <= x.shape[-1]:
        raise ValueError(
            f"weight: expected 1 to {x.shape[-1]} entries, the padded width of x, "
            f"got {weight.shape[0]}"
        )


def _specimens(sizes: Sizes) -> list[Arguments]:
    W = sizes.adapter
    return [(sizes.rows(sizes.padded), sizes.weight(W), sizes.weight(W), 1e-5)]


ADAPTER_NORM = register(
    Op(
        name="adapter_norm",
        schema="(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor",
        axes={"x": "B N P", "weight": "W", "bias": "W"},
        reference=reference.adapter_norm,
        specimens=_specimens,
        require=_require,
        backward=Backward(
            "(Tensor grad, Tensor x, Tensor weight, Tensor bias, float eps, bool parameters) -> "
            "(Tensor, Tensor, Tensor)"
        ),
    )
)
