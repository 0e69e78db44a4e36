"""One update of the ODE state: a linear combination of slopes, guidance and a clamp in one pass."""

import torch
from torch import Tensor

from blip3o_fast import reference
from blip3o_fast.axes import check_shape
from blip3o_fast.ops import _aten
from blip3o_fast.ops._cuda import dtype_refusal
from blip3o_fast.ops._dispatch import Impl, check_tensors
from blip3o_fast.ops._record import Arguments, Op
from blip3o_fast.ops._registration import register
from blip3o_fast.ops._specimens import Sizes


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

    All methods (Runge-Kutta, Adams-Bashforth, fitted) differ only in ``coefficients``, ``slot`` and
    ``clamp``. These are read from device memory, so one CUDA graph serves every evaluation of every
    method.

    Args:
        x: state ``[B, N, C]``, fp32 or fp64, any strides.
        velocity: the network's output ``[B, N, C]``, any floating dtype and strides. With guidance
            it is ``[2B, N, C]``, the conditional half first. v is this velocity after guidance.
        slopes: ``[R, B, N, C]`` in the dtype of ``x``: earlier v, R >= 0. Each row is contiguous.
            A row with coefficient zero is not read and may be uninitialised.
        coefficients: ``[R + 2]`` in the dtype of ``x``: of x, of v and of each row of ``slopes``.
        slot: int64 ``[1]``: the row of ``slopes`` that v overwrites, after it was read. A number
            outside 0 to R - 1, such as -1, keeps nothing. None keeps nothing either.
        clamp: ``[1]`` in the dtype of ``x``: the largest magnitude of the new state, at least 0.
            Infinity or None is no bound. NaN stays NaN.
        guidance_scale: 1 is no guidance (arXiv:2207.12598).
        out: where to write, contiguous ``[B, N, C]`` in the dtype of ``x``. It may be ``x`` itself
            and must not overlap other inputs. None makes a new tensor.
        impl: None chooses by device; where a gradient is recorded it is the reference.

    Returns:
        ``out``, the new state. Only the reference is differentiable. All implementations add in the
        order of the formula and round every product, so their fp32 results are equal bit by bit.
    """
    arguments = (x, velocity, slopes, coefficients, slot, clamp, guidance_scale)
    _check(*arguments, out)
    into = x.new_empty(x.shape) if out is None else out
    result = SOLVER_UPDATE(*arguments, into, impl=impl, checked=True)
    return result if out is None or result is out else out.copy_(result)


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


def _reference(
    x: Tensor,
    velocity: Tensor,
    slopes: Tensor,
    coefficients: Tensor,
    slot: Tensor | None,
    clamp: Tensor | None,
    guidance_scale: float,
    out: Tensor,
) -> Tensor:
    del out  # which would lose the gradient
    options = {"slot": slot, "clamp": clamp, "guidance_scale": guidance_scale}
    return reference.solver_update(x, velocity, slopes, coefficients, **options)


def _specimens(sizes: Sizes) -> list[Arguments]:
    C = sizes.channels
    x, v, w, out = sizes.wide_rows(C), sizes.rows(C), sizes.rows(C), sizes.wide_rows(C)
    rows = torch.stack((sizes.wide_rows(C), sizes.wide_rows(C)))
    numbers = x.new_tensor((0.9, 0.5, 0.25, -0.25))
    slot, clamp = torch.tensor([1], device=x.device), x.new_tensor([3.0])
    return [
        (x, v, rows[:1], numbers[:3], None, None, 1.0, out),
        (x, v, rows[:0], numbers[:2], None, None, 1.0, out),
        (x, torch.cat((v, w)), rows, numbers, slot, clamp, 2.0, out),
    ]


SOLVER_UPDATE = register(
    Op(
        name="solver_update",
        schema="(Tensor x, Tensor velocity, Tensor(a!) slopes, Tensor coefficients, Tensor? slot, "
        "Tensor? clamp, float guidance_scale, Tensor(b!) out) -> ()",
        axes=dict.fromkeys(("x", "velocity", "slopes", "coefficients", "slot", "clamp")),
        reference=_reference,
        specimens=_specimens,
        fake=lambda *_: None,
        require=_check,
        aten=_aten.solver_update,
        cuda=dtype_refusal,
    )
)
