"""FP8: ops whose rows come out in e4m3, and the product that takes them.

Activations have one scale a row, which the op that computed the row finds while it still holds it;
weights have one a row too, which is one an output channel. ``torch._scaled_mm`` multiplies the e4m3
numbers on the tensor cores, at up to twice the rate of bf16, adds in fp32 and applies both scales
to the sum. Inference only: nothing here has a gradient.
"""

from typing import Any

import torch
from torch import Tensor

from blip3o_fast import reference
from blip3o_fast.axes import check_shape
from blip3o_fast.ops._dispatch import Impl, outside_autocast, resolve_impl
from blip3o_fast.ops.sandwich_join import check_join
from blip3o_fast.ops.sandwich_norm import check_norm
from blip3o_fast.ops.swiglu import check_gate_up
from blip3o_fast.reference import Modulation, Quantised, quantise_rows

ALIGNMENT = 16
"""``torch._scaled_mm`` on a GPU takes widths and numbers of channels that are multiples of it."""


_REMEDY = "pass impl=Impl.REFERENCE, which emulates it"


def e4m3_refusal(device: torch.device) -> str | None:
    """Why ``device`` does not multiply e4m3, or None if it does."""
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
    """``x W^T`` of e4m3 rows, summed in fp32, in bf16.

    Args:
        x: ``[..., K]``.
        weight: ``[out, K]``; on a GPU both widths are multiples of 16.
        impl: ``Impl.REFERENCE`` emulates: it multiplies the same numbers in fp32, on any device and
            slowly. Everything else is ``torch._scaled_mm``.

    Raises:
        ValueError: where the hardware does not multiply e4m3, unless it is emulated.
    """
    _check_quantised("x", x)
    check_shape("weight", weight.values, "out K", K=x.values.shape[-1])
    _check_quantised("weight", weight)
    if impl is Impl.REFERENCE:
        with outside_autocast(x.values):
            return reference.scaled_linear(x, weight)
    if refusal := e4m3_refusal(x.values.device):
        raise ValueError(f"scaled_linear: {refusal}; {_REMEDY}")
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
    """``sandwich_norm`` with its rows in e4m3.

    A fused implementation rounds once; the reference rounds to the dtype of ``x`` before.
    """
    check_norm(x, w1, w2, shift, scale)
    inputs = (x, w1, w2, shift, scale)
    if _resolve(impl, "sandwich_norm", *inputs) is Impl.REFERENCE:
        with outside_autocast(x):
            return quantise_rows(reference.sandwich_norm(*inputs, eps))
    return Quantised(*torch.ops.blip3o_fast.sandwich_norm_quantised(*inputs, eps))


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
    """``sandwich_join`` with the rows of ``h`` in e4m3; the stream keeps the dtype of ``x``."""
    check_join(x, y, layer_scale, post, pre)
    norms = (*(post or (None,) * 4), *pre)
    if _resolve(impl, "sandwich_join", x, y, layer_scale, *norms) is Impl.REFERENCE:
        with outside_autocast(x):
            x_out, h = reference.sandwich_join(x, y, layer_scale, post, pre, eps)
            assert h is not None
            return x_out, quantise_rows(h)
    x_out, *h = torch.ops.blip3o_fast.sandwich_join_quantised(x, y, layer_scale, *norms, eps)
    return x_out, Quantised(*h)


def swiglu_quantised(gate_up: Tensor, *, impl: Impl | None = None) -> Quantised:
    """``swiglu`` with its rows in e4m3; fused, I is at most 8192."""
    check_gate_up(gate_up)
    if _resolve(impl, "swiglu", gate_up) is Impl.REFERENCE:
        with outside_autocast(gate_up):
            return quantise_rows(reference.swiglu(gate_up))
    return Quantised(*torch.ops.blip3o_fast.swiglu_quantised(gate_up))


def _check_quantised(name: str, x: Quantised) -> None:
    """Raise ``ValueError`` unless ``x`` is e4m3 with one fp32 scale a row."""
    if x.values.dtype != torch.float8_e4m3fn:
        raise ValueError(f"{name}.values: expected torch.float8_e4m3fn, got {x.values.dtype}")
    if x.scales.dtype != torch.float32 or x.scales.shape != (*x.values.shape[:-1], 1):
        raise ValueError(
            f"{name}.scales: expected float32 {[*x.values.shape[:-1], 1]}, "
            f"got {x.scales.dtype} {list(x.scales.shape)}"
        )


def _resolve(impl: Impl | None, op: str, x: Tensor, *rest: Tensor | None) -> Impl:
    """What computes the e4m3 form of ``op`` on ``x``; refuse to lose a gradient."""
    name = f"{op}_quantised"
    if torch.is_grad_enabled() and any(u is not None and u.requires_grad for u in (x, *rest)):
        raise ValueError(
            f"{name} records no gradient: expected torch.no_grad(), or inputs that need none"
        )
    impl = resolve_impl(impl, x, op=name)
    if impl is not Impl.REFERENCE and x.is_cuda and (refusal := e4m3_refusal(x.device)):
        raise ValueError(f"{name}: {refusal}; {_REMEDY}")
    return impl


torch.library.define(
    "blip3o_fast::sandwich_norm_quantised",
    "(Tensor x, Tensor w1, Tensor w2, Tensor shift, Tensor scale, float eps) -> (Tensor, Tensor)",
)
torch.library.define(
    "blip3o_fast::sandwich_join_quantised",
    "(Tensor x, Tensor y, Tensor? layer_scale, Tensor? w3, Tensor? w4, Tensor? post_shift, "
    "Tensor? post_scale, Tensor w1, Tensor w2, Tensor pre_shift, Tensor pre_scale, float eps) -> "
    "(Tensor, Tensor, Tensor)",
)
torch.library.define("blip3o_fast::swiglu_quantised", "(Tensor gate_up) -> (Tensor, Tensor)")


@torch.library.impl("blip3o_fast::sandwich_norm_quantised", ("cpu", "cuda"))
def _norm(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    from blip3o_kernels import sandwich_norm as kernels

    *norm, eps = rest
    return kernels.forward_quantised(x, kernels.Norm(*norm), eps=eps)


@torch.library.impl("blip3o_fast::sandwich_join_quantised", ("cpu", "cuda"))
def _join(x: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    from blip3o_kernels import sandwich_join as kernels

    layer_scale, *norms, eps = rest
    post = None if norms[0] is None else kernels.Norm(*norms[:4])
    return kernels.forward_quantised(x, y, layer_scale, post, kernels.Norm(*norms[4:]), eps=eps)


@torch.library.impl("blip3o_fast::swiglu_quantised", ("cpu", "cuda"))
def _swiglu(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    from blip3o_kernels import swiglu as kernels

    return kernels.forward_quantised(gate_up)


@torch.library.register_fake("blip3o_fast::sandwich_norm_quantised")
def _norm_fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    del rest
    return _rows_like(x, x.shape[-1])


@torch.library.register_fake("blip3o_fast::sandwich_join_quantised")
def _join_fake(x: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    del y, rest
    return x.new_empty(x.shape), *_rows_like(x, x.shape[-1])


@torch.library.register_fake("blip3o_fast::swiglu_quantised")
def _swiglu_fake(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    return _rows_like(gate_up, gate_up.shape[-1] // 2)


def _rows_like(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    rows = x.shape[:-1]
    return (
        x.new_empty((*rows, width), dtype=torch.float8_e4m3fn),
        x.new_empty((*rows, 1), dtype=torch.float32),
    )
