"""FP8: ops that return rows in e4m3, and the matrix product that takes such rows.

Every row has one scale. The op that computes a row of activations also computes its scale. A row of
a weight is an output channel. ``torch._scaled_mm`` multiplies e4m3 numbers on the tensor cores at
up to twice the rate of bf16, sums in fp32 and applies both scales to the sum. Nothing here has a
gradient: FP8 is for inference.
"""

from typing import Any

import torch
from torch import Tensor

from blip3o_fast import reference
from blip3o_fast.axes import check_shape
from blip3o_fast.ops._dispatch import Impl, choose, outside_autocast, refusal
from blip3o_fast.ops._record import Op, as_tuple
from blip3o_fast.ops.sandwich_join import ABSENT, SANDWICH_JOIN
from blip3o_fast.ops.sandwich_norm import SANDWICH_NORM
from blip3o_fast.ops.swiglu import SWIGLU
from blip3o_fast.reference import Modulation, Quantised, quantise_rows

ALIGNMENT = 16
"""On a GPU ``torch._scaled_mm`` takes multiples of this as widths and numbers of channels."""

_REMEDY = "pass impl=Impl.REFERENCE, which emulates it"


def e4m3_refusal(device: torch.device) -> str | None:
    """Why ``device`` cannot multiply e4m3, or None if it can."""
    expected = "expected an NVIDIA GPU of compute capability 8.9 or at least 9.0"
    if device.type != "cuda":
        return f"{expected}, got {device}"
    if torch.version.hip is not None:
        return f"{expected}, got an AMD GPU"
    properties = torch.cuda.get_device_properties(device)
    if (properties.major, properties.minor) < (8, 9):
        return f"{expected}, got {properties.name} of {properties.major}.{properties.minor}"
    return None


def scaled_linear(x: Quantised, weight: Quantised, *, impl: Impl | None = None) -> Tensor:
    """``x W^T`` of e4m3 rows, summed in fp32 and returned in bf16.

    Args:
        x: ``[..., K]``.
        weight: ``[out, K]``; on a GPU both are multiples of 16.
        impl: ``Impl.REFERENCE`` emulates: it multiplies the same numbers in fp32, slowly and on any
            device. Any other value runs ``torch._scaled_mm``.

    Raises:
        ValueError: if the hardware cannot multiply e4m3 and ``impl`` does not emulate it.
    """
    _check_quantised("x", x)
    check_shape("weight", weight.values, "out K", K=x.values.shape[-1])
    _check_quantised("weight", weight)
    if impl is Impl.REFERENCE:
        with outside_autocast(x.values):
            return reference.scaled_linear(x, weight)
    if reason := e4m3_refusal(x.values.device):
        raise ValueError(f"scaled_linear: {reason}; {_REMEDY}")
    for width in weight.values.shape:
        if width % ALIGNMENT:
            raise ValueError(
                f"weight: expected multiples of {ALIGNMENT}, as torch._scaled_mm multiplies, got "
                f"{list(weight.values.shape)}; {_REMEDY}"
            )
    out = torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        x.values.flatten(0, -2).contiguous(),
        weight.values.contiguous().t(),
        scale_a=x.scales.flatten(0, -2).contiguous(),
        scale_b=weight.scales.contiguous().t(),
        out_dtype=torch.bfloat16,
        # Fast accumulation keeps some 14 bits of a sum on Hopper (arXiv:2412.19437, 3.3.2).
        use_fast_accum=False,
    )
    return out.unflatten(0, x.values.shape[:-1])


def sandwich_norm_quantised(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    eps: float,
    impl: Impl | None = None,
) -> Quantised:
    """``sandwich_norm`` that returns rows in e4m3.

    A fused implementation rounds once. The reference first rounds to the dtype of ``x``.
    """
    return Quantised(*_quantised(SANDWICH_NORM, impl, x, w1, w2, shift, scale, eps))


def sandwich_join_quantised(
    x: Tensor,
    y: Tensor,
    layer_scale: Tensor | None,
    post: Modulation | None,
    pre: Modulation,
    *,
    eps: float,
    impl: Impl | None = None,
) -> tuple[Tensor, Quantised]:
    """``sandwich_join`` that returns ``h`` in e4m3. The stream keeps the dtype of ``x``."""
    x_out, *h = _quantised(SANDWICH_JOIN, impl, x, y, layer_scale, *(post or ABSENT), *pre, eps)
    return x_out, Quantised(*h)


def swiglu_quantised(gate_up: Tensor, *, impl: Impl | None = None) -> Quantised:
    """``swiglu`` that returns rows in e4m3. The fused kernel takes I up to 8192."""
    return Quantised(*_quantised(SWIGLU, impl, gate_up))


def _quantised(op: Op, impl: Impl | None, *arguments: Any) -> tuple[Tensor, ...]:
    """The results of ``op``, with two in place of the last one: its rows in e4m3, and scales."""
    op.check(*arguments)
    name, x = f"{op.name}_quantised", arguments[0]
    tensors = [u for u in arguments if isinstance(u, Tensor)]
    if torch.is_grad_enabled() and any(u.requires_grad for u in tensors):
        raise ValueError(
            f"{name} records no gradient: expected torch.no_grad(), or inputs that need none"
        )
    if impl in (Impl.ATEN, Impl.CUDA):
        raise ValueError(f"{name}: impl={impl.name} does not write e4m3; pass impl=Impl.TRITON")
    if impl is None:
        runs = x.is_cuda and refusal(op, Impl.TRITON, x) is None
        impl = Impl.TRITON if runs else Impl.REFERENCE
    impl = choose(op, impl, x)
    if impl is Impl.REFERENCE:
        *others, h = as_tuple(op(*arguments, impl=impl, checked=True))
        with outside_autocast(x):
            return *others, *quantise_rows(h)
    if x.is_cuda and (reason := e4m3_refusal(x.device)):
        raise ValueError(f"{name}: {reason}; {_REMEDY}")
    return op.fused[impl].find("forward_quantised", arguments)(*arguments)


def _check_quantised(name: str, x: Quantised) -> None:
    """Raise ``ValueError`` unless ``x`` is e4m3 with one fp32 scale a row."""
    if x.values.dtype != torch.float8_e4m3fn:
        raise ValueError(f"{name}.values: expected torch.float8_e4m3fn, got {x.values.dtype}")
    if x.scales.dtype != torch.float32 or x.scales.shape != (*x.values.shape[:-1], 1):
        raise ValueError(
            f"{name}.scales: expected float32 {[*x.values.shape[:-1], 1]}, "
            f"got {x.scales.dtype} {list(x.scales.shape)}"
        )
