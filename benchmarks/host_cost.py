"""What the host pays for one call of a fused op with Triton, measured without a GPU.

    python benchmarks/host_cost.py --json OUT.json

The kernels are compiled for sm_90, and Triton's driver is replaced by one that launches nothing, so
what is left is Python: checks, dispatch, autograd, Triton's own binding of arguments. Tensors are
on the CPU and hold one token. Beside each op stands ``torch.nn.functional.rms_norm`` on the same
token in the same run, which computes it in ATen: on a CPU its forward pass is one call into C++.
What a real driver adds is not in these figures.

Also the fixed cost of ``generate`` on a warm plan: all but the evaluations, on a network with as
many parameter tensors as base, each of few numbers.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from result_tables import show
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from blip3o_fast import BLIP3oDiT, DiTConfig
from blip3o_fast.atomic import write_json
from blip3o_fast.benchmarking.environment import describe_environment
from blip3o_fast.benchmarking.op_cases import sizes_of
from blip3o_fast.benchmarking.shapes import Shape
from blip3o_fast.flow import Trajectory
from blip3o_fast.ops import OPS, Impl, Op, _dispatch
from blip3o_fast.ops._record import as_tuple
from blip3o_fast.sampling.cache import find_engine

BASE = replace(sizes_of(Shape("base"), torch.bfloat16, "cpu"), tokens=1)


def nothing(*arguments: object) -> None:
    """Stands for a launch."""
    del arguments


STUB_DRIVER = SimpleNamespace(
    get_current_device=lambda: 0,
    get_current_stream=lambda _device: 0,
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
    launcher_cls=lambda _source, _metadata: nothing,
    utils=SimpleNamespace(
        get_device_properties=lambda _device: {"max_shared_mem": 232448},
        load_binary=lambda *_: (object(), 0, 0, 0, 1024),
    ),
)
"""A driver of Triton that loads and launches nothing."""


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--calls", type=int, default=2000, help="calls of each op, in 20 rounds")
    add("--json", required=True, help="where to write the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    facts: dict[str, Any] = {
        "benchmark": "host_cost",
        "environment": describe_environment(torch.device("cpu")),
        "ops": [],
        "warm_call": warm_call(),
    }
    driver.set_active(STUB_DRIVER)
    _dispatch.interpreting = lambda: True  # accept CPU tensors; nothing is interpreted
    for op in OPS.values():
        if not op.combines:
            facts["ops"].append({"op": op.name, **cost(op, args.calls)})
    write_json(Path(args.json), facts)
    print(show(facts))


def warm_call() -> dict[str, float]:
    """Microseconds of ``generate`` without its evaluations, and of its look at the weights."""
    config = DiTConfig.preset(
        "base",
        hidden_size=48,
        intermediate_size=64,
        num_attention_heads=12,
        num_key_value_heads=4,
        eva_embedding_size=64,
        clip_embedding_size=32,
        num_tokens=4,
        grid=(1, 2, 2),
    )
    model = BLIP3oDiT(config).eval()
    eva, noise = torch.randn(1, 4, 64), torch.randn(1, 4, 32)
    advance, Trajectory.advance = Trajectory.advance, nothing
    try:
        return times(
            {
                "generate": lambda: model.generate(eva, noise=noise, num_inference_steps=1),
                "find_engine": lambda: find_engine(model, torch.float32),
            },
            400,
        )
    finally:
        Trajectory.advance = advance


def cost(op: Op, calls: int) -> dict[str, float | None]:
    """Microseconds of a call, of a call with its backward pass, and of torch's ``rms_norm``."""
    arguments = op.specimens(BASE)[0]
    row, weight = torch.randn(1, 1, 768), torch.ones(768)

    def forward() -> None:
        op(*arguments, impl=Impl.TRITON)

    def torch_forward() -> None:
        F.rms_norm(row, (768,), weight)

    with torch.no_grad():
        found = times({"forward": forward, "torch_forward": torch_forward}, calls)
    if op.backward is None:
        return {**found, "both": None, "torch_both": None}
    given = [
        x.detach().requires_grad_() if i < op.differentiable and isinstance(x, Tensor) else x
        for i, x in enumerate(arguments)
    ]
    leaves = [x for x in given if isinstance(x, Tensor) and x.requires_grad]
    wanted = row.clone().requires_grad_(), weight.clone().requires_grad_()

    def both() -> None:
        results = as_tuple(op(*given, impl=Impl.TRITON))[: op.backward.results]
        torch.autograd.grad(results, leaves, [torch.ones_like(r) for r in results])

    def torch_both() -> None:
        result = F.rms_norm(wanted[0], (768,), wanted[1])
        torch.autograd.grad(result, wanted, torch.ones_like(result))

    return found | times({"both": both, "torch_both": torch_both}, calls)


def times(contenders: dict[str, Callable[[], object]], calls: int) -> dict[str, float]:
    """Microseconds of a call of each: medians of 20 rounds, in which all take turns."""
    rounds: dict[str, list[float]] = {name: [] for name in contenders}
    each = max(1, calls // 20)
    for call in contenders.values():
        call()
    for _ in range(20):
        for name, call in contenders.items():
            started = time.perf_counter()
            for _ in range(each):
                call()
            rounds[name].append((time.perf_counter() - started) / each * 1e6)
    return {name: median(found) for name, found in rounds.items()}


if __name__ == "__main__":
    main()
