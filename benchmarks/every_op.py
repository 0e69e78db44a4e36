"""Every fused op once, forward and backward, by every implementation that can run here.

    python benchmarks/every_op.py [--device cuda]

Small enough to run under compute-sanitizer: 3 samples of 49 tokens at the widths of tiny, so that
no tile is full. Exits with 1 if a result differs from the reference in fp64.

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
from blip3o_fast.benchmarking.op_cases import SPECS, OpSpec, op_call
from blip3o_fast.benchmarking.shapes import Shape
from blip3o_fast.ops import Impl

SHAPE = Shape("tiny", batch=3, tokens=49)
ALLOWED = {torch.bfloat16: 3e-2, torch.float32: 1e-4}
"""Distance of a result from the reference in fp64, relative to the norm of that, by dtype."""
DELAY_CYCLES = 1 << 21
"""About a millisecond: longer than the host takes to launch a compiled kernel."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, compare, print a line an op."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    device = torch.device(parser.parse_args(arguments).device)
    wrong = 0
    for dtype in ALLOWED:
        with current_stream(device, dtype):
            wrong += count_wrong(device, dtype)
    return 1 if wrong else 0


def current_stream(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """The stream on which ops of a dtype are checked."""
    if device.type == "cpu":
        return nullcontext()
    default = dtype is torch.float32
    return torch.cuda.stream(torch.cuda.default_stream() if default else torch.cuda.Stream())


def count_wrong(device: torch.device, dtype: torch.dtype) -> int:
    """Results that differ; prints a line each."""
    wrong, allowed = 0, ALLOWED[dtype]
    for spec in (*SPECS, ROPE_ATTENTION):
        for impl in implementations(spec, dtype, device):
            what = f"{spec.name}, {str(dtype).removeprefix('torch.')}, {impl.value}"
            distance = worst_distance(spec, dtype, device, impl)
            good = distance <= allowed
            print(f"{what}: {'good' if good else 'WRONG'}, {distance:.1e} of {allowed:.0e}")
            wrong += not good
    return wrong


def implementations(spec: OpSpec, dtype: torch.dtype, device: torch.device) -> list[Impl]:
    """What can run an op here; on a CPU the reference alone."""
    if device.type == "cpu":
        return [Impl.REFERENCE]
    sample = torch.empty(1, 1, SHAPE.config.hidden_size, dtype=dtype, device=device)
    found: list[Impl] = []
    for impl in (Impl.TRITON, Impl.CUDA):
        try:
            found.append(ops.resolve_impl(impl, sample, op=spec.name))
        except ValueError as error:
            print(f"{spec.name}, {impl.value}: not here: {error}")
    return found


def worst_distance(spec: OpSpec, dtype: torch.dtype, device: torch.device, impl: Impl) -> float:
    """Of an implementation's outputs and gradients from those of the reference in fp64.

    NaN anywhere is infinitely far.
    """
    torch.manual_seed(0)
    tensors = spec.tensors(SHAPE, dtype, device)
    outputs_and_gradients(spec, tensors, impl)  # compiled here, so that the next call is quick
    results = outputs_and_gradients(spec, tensors, impl)
    expected = outputs_and_gradients(spec, [x.double() for x in tensors], Impl.REFERENCE)
    distances = [
        float((got.double() - want).norm() / want.norm().clamp_min(1e-30))
        for got, want in zip(results, expected, strict=True)
    ]
    return max(x if math.isfinite(x) else math.inf for x in distances)


def outputs_and_gradients(spec: OpSpec, tensors: list[Tensor], impl: Impl) -> list[Tensor]:
    """Of the sum of all outputs, weighed with random numbers that are the same in every dtype."""
    # Written anew: some ops may overwrite their input.
    late = written_late(tensors)
    leaves = [x.requires_grad_() for x in late[: spec.differentiable]]
    rest = late[spec.differentiable :]
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
