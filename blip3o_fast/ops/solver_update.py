"""One update of the ODE state: any linear combination of slopes, guidance and clamp in one pass."""

import torch
from torch import Tensor

from blip3o_fast import reference
from blip3o_fast.axes import check_shape
from blip3o_fast.ops import _aten
from blip3o_fast.ops._dispatch import (
    Impl,
    check_tensors,
    operators,
    outside_autocast,
    resolve_impl,
)


def solver_update(
    x: Tensor,
    velocity: Tensor,
    slopes: Tensor,
    coefficients: Tensor,
    *,
    slot: Tensor | None = None,
    clamp: Tensor | None = None,
    guidance_scale: float = 1.0,
    out: Tensor | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """``c[0] x + c[1] v + c[2] slopes[0] + c[3] slopes[1] + ..``, computed in the dtype of ``x``.

    Runge-Kutta, Adams-Bashforth and fitted methods differ in ``coefficients``, ``slot`` and
    ``clamp`` alone. All are read from device memory, so one CUDA graph serves every evaluation of
    every method.

    Args:
        x: state ``[B, N, C]``, fp32 or fp64, any strides.
        velocity: the newest evaluation ``[B, N, C]``; with guidance ``[2B, N, C]``, the conditional
            half first. Any floating dtype and strides. v is this velocity, guided.
        slopes: ``[R, B, N, C]`` in the dtype of ``x``: earlier v, R >= 0. Each row is contiguous.
            A row whose coefficient is zero is not read: it may be uninitialised.
        coefficients: ``[R + 2]`` in the dtype of ``x``: of x, of v, of each row of ``slopes``.
        slot: int64 ``[1]``: the row of ``slopes`` that v overwrites, after that row was read. A
            number outside 0 to R - 1, such as -1, keeps nothing; None never keeps anything.
        clamp: ``[1]`` in the dtype of ``x``: bound of at least 0 on the new state's magnitude;
            infinity or None: no bound. NaN stays NaN.
        guidance_scale: 1 is no guidance (arXiv:2207.12598).
        out: where to write, contiguous ``[B, N, C]`` in the dtype of ``x``. It may be ``x`` itself,
            and must not overlap other inputs. None makes a new tensor.
        impl: None chooses by device, and the reference where a gradient is recorded.

    Returns:
        ``out``, the new state. Only the reference is differentiable. All implementations add in the
        order of the formula and round every product: in fp32 their results are equal bit by bit.
    """
    _check(x, velocity, slopes, coefficients, slot, clamp, guidance_scale, out)
    given = [u for u in (x, velocity, slopes, coefficients, clamp) if u is not None]
    recording = torch.is_grad_enabled() and any(u.requires_grad for u in given)
    if impl is None and recording:
        impl = Impl.REFERENCE
    impl = resolve_impl(impl, x, op="solver_update")
    if impl is Impl.REFERENCE:
        with outside_autocast(x):
            result = reference.solver_update(
                x,
                velocity,
                slopes,
                coefficients,
                slot=slot,
                clamp=clamp,
                guidance_scale=guidance_scale,
            )
        return result if out is None else out.copy_(result)
    if recording:
        raise ValueError(
            f"impl={impl}: the fused update records no gradient, and an input requires one; call "
            "it under torch.no_grad(), or pass impl=Impl.REFERENCE to differentiate"
        )
    if out is None:
        out = x.new_empty(x.shape)
    run = _aten.solver_update if impl is Impl.ATEN else operators(impl).solver_update
    run(x, velocity, slopes, coefficients, slot, clamp, guidance_scale, out)
    return out


def _check(
    x: Tensor,
    velocity: Tensor,
    slopes: Tensor,
    coefficients: Tensor,
    slot: Tensor | None,
    clamp: Tensor | None,
    guidance_scale: float,
    out: Tensor | None,
) -> None:
    check_shape("x", x, "B N C")
    B, N, C = x.shape
    check_shape("velocity", velocity, "B N C", B=B if guidance_scale == 1.0 else 2 * B, N=N, C=C)
    check_shape("slopes", slopes, "R B N C", B=B, N=N, C=C)
    R = slopes.shape[0]
    if coefficients.shape != (R + 2,):
        raise ValueError(
            f"coefficients: expected shape [R + 2 = {R + 2}], of x, of the velocity and of the {R} "
            f"rows of slopes, got {list(coefficients.shape)}"
        )
    of_x = {"slopes": slopes, "coefficients": coefficients, "clamp": clamp, "out": out}
    check_tensors(x=x, velocity=velocity, **of_x)
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x: expected float32 or float64, the state's precision, got {x.dtype}")
    for name, tensor in of_x.items():
        if tensor is not None and tensor.dtype != x.dtype:
            raise ValueError(f"{name}: expected {x.dtype}, the dtype of x, got {tensor.dtype}")
    if not (slopes.is_contiguous() or slopes[:1].is_contiguous()):
        raise ValueError(f"slopes: expected contiguous rows, got strides {slopes.stride()}")
    if out is not None:
        check_shape("out", out, "B N C", B=B, N=N, C=C)
        if not out.is_contiguous():
            raise ValueError(f"out: expected a contiguous tensor, got strides {out.stride()}")
    if slot is not None and (
        slot.dtype != torch.int64 or slot.shape != (1,) or slot.device != x.device
    ):
        raise ValueError(
            f"slot: expected int64 of shape [1] on {x.device}, got {slot.dtype} of shape "
            f"{list(slot.shape)} on {slot.device}"
        )
    if clamp is not None and clamp.shape != (1,):
        raise ValueError(f"clamp: expected shape [1], got {list(clamp.shape)}")


torch.library.define(
    "blip3o_fast::solver_update",
    "(Tensor x, Tensor velocity, Tensor(a!) slopes, Tensor coefficients, Tensor? slot, "
    "Tensor? clamp, float guidance_scale, Tensor(b!) out) -> ()",
)


@torch.library.impl("blip3o_fast::solver_update", ("cpu", "cuda"))
def _forward(
    x: Tensor,
    velocity: Tensor,
    slopes: Tensor,
    coefficients: Tensor,
    slot: Tensor | None,
    clamp: Tensor | None,
    guidance_scale: float,
    out: Tensor,
) -> None:
    from blip3o_kernels import solver_update as kernels

    kernels.forward(
        x,
        velocity,
        slopes,
        coefficients,
        slot=slot,
        clamp=clamp,
        guidance_scale=guidance_scale,
        out=out,
    )


@torch.library.register_fake("blip3o_fast::solver_update")
def _forward_fake(
    x: Tensor,
    velocity: Tensor,
    slopes: Tensor,
    coefficients: Tensor,
    slot: Tensor | None,
    clamp: Tensor | None,
    guidance_scale: float,
    out: Tensor,
) -> None:
    del x, velocity, slopes, coefficients, slot, clamp, guidance_scale, out
