"""Every fused op once, forward and backward, by every implementation that can run here.

    python benchmarks/every_op.py [--device cuda] [--impl triton cuda] [--dtype bf16]

It is small enough for compute-sanitizer: 3 samples of 49 tokens at the widths of tiny, so that no
tile is full. Inputs are drawn and compared on the CPU, so a GPU runs little more than our kernels.
Exits with 1 if a result differs from the reference in fp64.

A kernel must run on the current stream, after its inputs were written. To check this, inputs first
hold NaN, and the device is kept busy before it writes them. A kernel on another stream would read
NaN. The current stream is the default one for fp32, and another one for bf16.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from blip3o_fast import ops
from blip3o_fast.benchmarking.ceilings import DTYPES
from blip3o_fast.benchmarking.op_cases import sizes_of
from blip3o_fast.benchmarking.shapes import Shape
from blip3o_fast.ops import OPS, Impl, Op

SHAPE = Shape("tiny", batch=3, tokens=49)
CPU = torch.device("cpu")
ALLOWED = {"bf16": 3e-2, "fp32": 1e-4}
"""The largest distance from the reference in fp64, relative to its norm, by dtype."""
DELAY_CYCLES = 1 << 21
"""About a millisecond: longer than the host takes to launch a compiled kernel."""

IMPLS = {"cuda": ("triton", "cuda"), "cpu": ("reference", "aten", "triton")}
"""The default, by device. On a CPU Triton's kernels need its interpreter."""


class Unavailable(Exception):
    """An implementation that cannot run here."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, compare, print a line an op."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--impl", nargs="+", choices=[impl.value for impl in Impl],
        help="default: all that such a device may have")  # fmt: skip
    parser.add_argument("--dtype", nargs="+", default=list(ALLOWED), choices=list(ALLOWED))
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    wrong = 0
    for op in OPS.values():
        for dtype in args.dtype:
            for impl in map(Impl, args.impl or IMPLS[args.device]):
                what = f"{op.name}, {dtype}, {impl.value}"
                try:
                    distance = worst_distance(op, dtype, device, impl)
                except Unavailable as error:
                    print(f"{what}: not here: {error}")
                    continue
                good = distance <= ALLOWED[dtype]
                print(f"{what}: {'good' if good else 'WRONG'}, {distance:.1e} of {ALLOWED[dtype]}")
                wrong += not good
    return 1 if wrong else 0


def current_stream(device: torch.device, dtype: str) -> AbstractContextManager[object]:
    """The stream on which ops of a dtype are checked."""
    if device.type == "cpu":
        return nullcontext()
    default = dtype == "fp32"
    return torch.cuda.stream(torch.cuda.default_stream() if default else torch.cuda.Stream())


def worst_distance(op: Op, dtype: str, device: torch.device, impl: Impl) -> float:
    """The largest distance of outputs and gradients from those of the reference in fp64.

    The distance of NaN is infinite.

    Raises:
        Unavailable: if it cannot run here.
    """
    require(op, dtype, device, impl)
    torch.manual_seed(0)
    drawn = op.specimens(sizes_of(SHAPE, DTYPES[dtype], CPU))[0]
    with current_stream(device, dtype):
        arguments = moved(drawn, device)
        outputs_and_gradients(op, arguments, impl)  # compiled here, so that the next call is quick
        results = [x.cpu() for x in outputs_and_gradients(op, arguments, impl)]
    expected = outputs_and_gradients(op, moved(drawn, torch.float64), Impl.REFERENCE)
    return max(map(relative, results, expected))


def relative(got: Tensor, want: Tensor) -> float:
    """The distance of two tensors over the norm of the second; infinite if it is NaN."""
    distance = float((got.double() - want).norm() / want.norm().clamp_min(1e-30))
    return distance if math.isfinite(distance) else math.inf


def moved(arguments: tuple[Any, ...], to: torch.device | torch.dtype) -> list[Any]:
    """Copies of the tensors on another device; or in another dtype, unless they hold integers."""

    def copy(x: Tensor) -> Tensor:
        fits = isinstance(to, torch.device) or x.is_floating_point()
        return x.to(to, copy=True) if fits else x.clone()

    return [copy(x) if isinstance(x, Tensor) else x for x in arguments]


def require(op: Op, dtype: str, device: torch.device, impl: Impl) -> None:
    """Raise ``Unavailable`` unless ``impl`` can run an op on ``device``."""
    sample = torch.empty(1, 1, SHAPE.config.hidden_size, dtype=DTYPES[dtype], device=device)
    try:
        with torch.set_grad_enabled(impl is not Impl.ATEN):
            ops.resolve_impl(impl, sample, op=op.name)
    except ValueError as error:
        raise Unavailable(str(error)) from None


def outputs_and_gradients(op: Op, arguments: list[Any], impl: Impl) -> list[Tensor]:
    """The results, and the gradients for random gradients that are the same on all devices.

    ``ATEN`` has no gradients; it gives its results only.
    """
    count = 0 if impl is Impl.ATEN else op.differentiable
    # Written anew: some ops may overwrite their input.
    arguments = written_late(arguments)
    leaves = [x.requires_grad_() for x in arguments[:count]]
    with torch.set_grad_enabled(count > 0):
        outputs = list(op.function(impl)(*arguments))
    if not leaves:
        return outputs
    torch.manual_seed(1)
    weights = written_late([torch.randn(x.shape).bfloat16().to(x) for x in outputs])
    gradients = torch.autograd.grad(outputs, leaves, weights)
    return [*(x.detach() for x in outputs), *gradients]


def written_late(arguments: list[Any]) -> list[Any]:
    """Copies of the tensors that hold NaN until the device writes them on the current stream."""
    late = [torch.full_like(x, blank(x)) if isinstance(x, Tensor) else x for x in arguments]
    if any(isinstance(x, Tensor) and x.is_cuda for x in late):
        torch.cuda.current_stream().synchronize()
        torch.cuda._sleep(DELAY_CYCLES)  # pyright: ignore[reportPrivateUsage]
    for copy, x in zip(late, arguments, strict=True):
        if isinstance(x, Tensor):
            copy.copy_(x)
    return late


def blank(x: Tensor) -> float:
    """The content of a tensor before it is written: NaN, or for integers -1, a slot of nothing."""
    return math.nan if x.is_floating_point() else -1


if __name__ == "__main__":
    sys.exit(main())
