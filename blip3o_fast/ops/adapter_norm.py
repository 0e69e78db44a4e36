"""LayerNorm, GELU and dropout of an adapter layer, on rows padded to a width that suits GEMMs."""

import torch
from torch import Tensor

from blip3o_fast import reference
from blip3o_fast.ops._dispatch import Impl
from blip3o_fast.ops._record import Arguments, Backward, Op
from blip3o_fast.ops._registration import register
from blip3o_fast.ops._specimens import Sizes


def adapter_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """``dropout(gelu(layer_norm(x[..., :W])))``, with zeros in the padding ``[..., W:]``.

    The adapter's widths (3541, 2986, 1877 and 1322 for base) are not multiples of 8. 16-bit GEMMs
    of such widths are slow on tensor cores, so activations are padded. The padding of ``x`` is not
    read, and its gradient is zero.

    Args:
        x: ``[B, N, P]`` with P >= W, any strides.
        weight, bias: ``[W]``.
        eps: added to the variance.
        dropout: probability of a zero, rounded to a multiple of 2^-16. What is kept is divided by
            the probability to be kept.
        seed: int64 ``[1]`` on the device of ``x``, from which the zeros follow: the same by every
            implementation on every device. It must be given if anything is dropped.
        impl: None chooses by device.

    Returns:
        ``[B, N, P]`` in the dtype of ``x``. Differentiable once in every tensor.
    """
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a probability below 1, got {dropout}")
    dropped = min(round(65536 * dropout), 65535)
    return ADAPTER_NORM(x, weight, bias, seed if dropped else None, eps, dropped, impl=impl)


def _require(
    x: Tensor, weight: Tensor, bias: Tensor, seed: Tensor | None, eps: float, dropped: int
) -> None:
    del bias, eps
    if not 1 <= weight.shape[0] <= x.shape[-1]:
        raise ValueError(
            f"weight: expected 1 to {x.shape[-1]} entries, the padded width of x, "
            f"got {weight.shape[0]}"
        )
    if dropped and seed is None:
        raise ValueError("seed: expected int64 of shape [1] for dropout, got None")
    if seed is not None and (
        seed.dtype != torch.int64 or seed.shape != (1,) or seed.device != x.device
    ):
        raise ValueError(
            f"seed: expected int64 of shape [1] on {x.device}, got {seed.dtype} of shape "
            f"{list(seed.shape)} on {seed.device}"
        )


def _specimens(sizes: Sizes) -> list[Arguments]:
    W = sizes.adapter
    given = sizes.rows(sizes.padded), sizes.weight(W), sizes.weight(W)
    return [(*given, None, 1e-5, 0), (*given, sizes.seed(), 1e-5, 6554)]


_GIVEN = "Tensor x, Tensor weight, Tensor bias, Tensor? seed, float eps, int dropped"

ADAPTER_NORM = register(
    Op(
        name="adapter_norm",
        schema=f"({_GIVEN}) -> Tensor",
        axes={"x": "B N P", "weight": "W", "bias": "W", "seed": None},
        reference=reference.adapter_norm,
        specimens=_specimens,
        require=_require,
        backward=Backward(f"(Tensor grad, {_GIVEN}, bool parameters) -> (Tensor, Tensor, Tensor)"),
    )
)
