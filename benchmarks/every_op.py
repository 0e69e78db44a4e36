"""Every fused op once, forward and backward, by every implementation that can run here.

    python benchmarks/every_op.py [--device cuda] [--impl triton cuda] [--dtype bf16]

Small enough to run under compute-sanitizer: 3 samples of 49 tokens at the widths of tiny, so that
no tile is full; inputs are drawn and compared on the CPU, so that a GPU runs little but our
kernels. Exits with 1 if a result differs from the reference in fp64.

A kernel must run on the current stream, after what writes its inputs. So the device is kept busy
before it writes them, over NaN: a kernel on any other stream reads the NaN. The current stream is
the default one for fp32 and another for bf16.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from blip3o_fast import ops
from blip3o_fast.benchmarking.attention_cases import ROPE_ATTENTION
from blip3o_fast.benchmarking.ceilings import DTYPES
from blip3o_fast.benchmarking.op_cases import SPECS, OpSpec, op_call
from blip3o_fast.benchmarking.shapes import Shape
from blip3o_fast.ops import Impl

SHAPE = Shape("tiny", batch=3, tokens=49)
CPU = torch.device("cpu")
ALLOWED = {"bf16": 3e-2, "fp32": 1e-4}
"""Distance of a result from the reference in fp64, relative to the norm of that, by dtype."""
DELAY_CYCLES = 1 << 21
"""About a millisecond: longer than the host takes to launch a compiled kernel."""

IMPLS = {"cuda": ("triton", "cuda"), "cpu": ("reference", "aten", "triton")}
"""By device; on a CPU Triton's kernels need its interpreter."""


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
    for spec in specs():
        for dtype in args.dtype:
            for impl in map(Impl, args.impl or IMPLS[args.device]):
                what = f"{spec.name}, {dtype}, {impl.value}"
                try:
                    distance = worst_distance(spec, dtype, device, impl)
                except Unavailable as error:
                    print(f"{what}: not here: {error}")
                    continue
                good = distance <= ALLOWED[dtype]
                print(f"{what}: {'good' if good else 'WRONG'}, {distance:.1e} of {ALLOWED[dtype]}")
                wrong += not good
    return 1 if wrong else 0


def specs() -> tuple[OpSpec, ...]:
    """Every op, the one of a single kernel for rotation and attention among them."""
    return (*SPECS, ROPE_ATTENTION)


def current_stream(device: torch.device, dtype: str) -> AbstractContextManager[object]:
    """The stream on which ops of a dtype are checked."""
    if device.type == "cpu":
        return nullcontext()
    default = dtype == "fp32"
    return torch.cuda.stream(torch.cuda.default_stream() if default else torch.cuda.Stream())


def worst_distance(spec: OpSpec, dtype: str, device: torch.device, impl: Impl) -> float:
    """Of an implementation's outputs and gradients from those of the reference in fp64.

    NaN anywhere is infinitely far.

    Raises:
        Unavailable: if it cannot run here.
    """
    require(spec, dtype, device, impl)
    torch.manual_seed(0)
    drawn = spec.tensors(SHAPE, DTYPES[dtype], CPU)
    with current_stream(device, dtype):
        tensors = [x.to(device) for x in drawn]
        outputs_and_gradients(spec, tensors, impl)  # compiled here, so that the next call is quick
        results = [x.cpu() for x in outputs_and_gradients(spec, tensors, impl)]
    expected = outputs_and_gradients(spec, [x.double() for x in drawn], Impl.REFERENCE)
    distances = [
        float((got.double() - want).norm() / want.norm().clamp_min(1e-30))
        for got, want in zip(results, expected[: len(results)], strict=True)
    ]
    return max(x if math.isfinite(x) else math.inf for x in distances)


def require(spec: OpSpec, dtype: str, device: torch.device, impl: Impl) -> None:
    """Raise ``Unavailable`` unless ``impl`` can run an op on ``device``."""
    sample = torch.empty(1, 1, SHAPE.config.hidden_size, dtype=DTYPES[dtype], device=device)
    try:
        with torch.set_grad_enabled(impl is not Impl.ATEN):
            ops.resolve_impl(impl, sample, op=spec.name)
    except ValueError as error:
        raise Unavailable(str(error)) from None


def outputs_and_gradients(spec: OpSpec, tensors: list[Tensor], impl: Impl) -> list[Tensor]:
    """Of the sum of all outputs, weighed with random numbers that are the same in every dtype.

    ``ATEN`` has no gradients: its outputs alone.
    """
    count = 0 if impl is Impl.ATEN else spec.differentiable
    # Written anew: some ops may overwrite their input.
    late = written_late(tensors)
    leaves = [x.requires_grad_() for x in late[:count]]
    rest = late[count:]
    with torch.set_grad_enabled(count > 0):
        result = op_call(spec, SHAPE, impl)(*leaves, *rest)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    if not leaves:
        return outputs
    torch.manual_seed(1)
    weights = written_late([torch.randn(x.shape).bfloat16().to(x) for x in outputs])
    gradients = torch.autograd.grad(outputs, leaves, weights)
    return [*(x.detach() for x in outputs), *gradients]


def written_late(tensors: list[Tensor]) -> list[Tensor]:
    """Copies that hold NaN until the device, on the current stream, comes to write them."""
    late = [torch.full_like(x, torch.nan) for x in tensors]
    if tensors[0].is_cuda:
        torch.cuda.current_stream().synchronize()
        torch.cuda._sleep(DELAY_CYCLES)  # pyright: ignore[reportPrivateUsage]
    for copy, x in zip(late, tensors, strict=True):
        copy.copy_(x)
    return late


if __name__ == "__main__":
    sys.exit(main())
