"""Every fused op once, forward and backward, by every implementation that can run here.

    python benchmarks/every_op.py [--device cuda] [--impl triton cuda] [--dtype bf16]

Small enough to run under compute-sanitizer: 3 samples of 49 tokens at the widths of tiny, so that
no tile is full; inputs are drawn and compared on the CPU, so that a GPU runs little but our
kernels. Exits with 1 if a result differs from the reference in fp64.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from contextlib import nullcontext

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


def worst_distance(spec: OpSpec, dtype: str, device: torch.device, impl: Impl) -> float:
    """Of an implementation's outputs and gradients from those of the reference in fp64.

    NaN anywhere is infinitely far.

    Raises:
        Unavailable: if it cannot run here.
    """
    require(spec, dtype, device, impl)
    torch.manual_seed(0)
    drawn = spec.tensors(SHAPE, DTYPES[dtype], CPU)
    # On a stream of its own: a kernel that is launched on the default one whatever the current
    # stream is then runs beside what it needs, and shows.
    on_cuda = device.type == "cuda"
    with torch.cuda.stream(torch.cuda.Stream()) if on_cuda else nullcontext():
        tensors = [x.to(device) for x in drawn]
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
    leaves = [x.detach().clone().requires_grad_() for x in tensors[:count]]
    # Cloned: some ops may overwrite their input.
    rest = [x.clone() for x in tensors[count:]]
    with torch.set_grad_enabled(count > 0):
        result = op_call(spec, SHAPE, impl)(*leaves, *rest)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    if not leaves:
        return outputs
    torch.manual_seed(1)
    weights = [torch.randn(x.shape).bfloat16().to(x) for x in outputs]
    gradients = torch.autograd.grad(outputs, leaves, weights)
    return [*(x.detach() for x in outputs), *gradients]


if __name__ == "__main__":
    sys.exit(main())
