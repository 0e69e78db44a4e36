"""Where the time of an evaluation or a training step goes: its slowest launches and their limits.

    python benchmarks/profile_launches.py --json profile.json [--of training] [--batch 64]

torch.profiler watches an evaluation of the sampler, without a graph, or a whole optimizer step.
Launches of one operator with the same input shapes are added up. On a GPU the time is that of the
kernels, on a CPU that of the operator itself. A limit is ``max(flops / rate, bytes / bandwidth)``,
with both rates from the same run. Bytes count every input and every output once. Small operators of
torch have no limit, since their inputs stay in caches.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from result_tables import show
from torch.profiler import ProfilerActivity, profile

from blip3o_fast.atomic import write_json
from blip3o_fast.benchmarking import work
from blip3o_fast.benchmarking.ceilings import DTYPES, measure_ceilings
from blip3o_fast.benchmarking.environment import describe_environment
from blip3o_fast.benchmarking.network_cases import Network, hoisted
from blip3o_fast.benchmarking.shapes import Shape
from blip3o_fast.benchmarking.training_cases import Training, prepare_step, step_work
from blip3o_fast.benchmarking.watch import Prepared
from blip3o_fast.config import PRESETS, DiTConfig
from blip3o_fast.ops import OPS, Sizes

KIND = "blip3o-fast profile"
FORMAT = 1
CALLS = 5
WARM_UP = 3
What = Literal["evaluation", "training"]
SAMPLES: dict[What, int] = {"evaluation": 64, "training": 128}
NAMES: dict[What, str] = {"evaluation": "one evaluation", "training": "one training step"}
ATTENTIONS = ("flash_att", "efficient_attention", "cudnn_attention", "rope_attention")
"""Parts of the names of operators that compute attention, not of those that choose among them."""


@dataclass
class Launch:
    """An operator at some shapes, within one evaluation or training step.

    Attributes:
        op: its name in torch.
        shapes: of its tensor inputs.
        calls: how often it was called.
        seconds: of all calls together.
        share: of the whole time.
        limit: the least time that all calls could take, or None.
        launches: kernels of all calls; on a CPU the number of calls.
        kernels: names of the GPU kernels.
    """

    op: str
    shapes: list[list[int]]
    calls: float
    seconds: float
    launches: float
    share: float = 0.0
    limit: float | None = None
    kernels: list[str] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> int:
    """Profile, print a table, write JSON."""
    args = parse_arguments(arguments)
    device = torch.device(args.device)
    shape = Shape(args.preset, args.batch or SAMPLES[args.of])
    environment = describe_environment(device)
    ceilings = measure_ceilings(device, (args.dtype,), seconds=0.3)
    launches = profile_launches(args.of, shape, args.dtype, device)
    total = sum(launch.seconds for launch in launches)
    size = DTYPES[args.dtype].itemsize
    for launch in launches:
        launch.share = launch.seconds / total
        counted = count_work(launch, shape.config, shape.batch, size)
        launch.limit = counted and ceilings.seconds(counted, args.dtype) * launch.calls
    launches.sort(key=lambda launch: -launch.seconds)
    needed = total_work(args.of, shape, size)
    content = {
        "kind": KIND,
        "format": FORMAT,
        "task": {"name": NAMES[args.of], "shape": shape.name, "dtype": args.dtype},
        "environment": environment,
        "bandwidth": ceilings.bandwidth,
        "rates": ceilings.rates,
        "seconds": total,
        "limit": ceilings.seconds(needed, args.dtype),
        "launches": sum(launch.launches for launch in launches),
        "dearest": [asdict(launch) for launch in launches[: args.most]],
        "rest_seconds": sum(launch.seconds for launch in launches[args.most :]),
    }
    print(show(content))
    if args.json is not None:
        write_json(args.json, content)
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--of", default="evaluation", choices=tuple(NAMES))
    parser.add_argument("--preset", default="base", choices=tuple(PRESETS))
    parser.add_argument("--batch", type=int, help="samples; default 64, of training 128")
    parser.add_argument("--dtype", default="bf16", choices=tuple(DTYPES))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--most", type=int, default=10, help="launches shown")
    parser.add_argument("--json", type=Path, help="where to write the result")
    return parser.parse_args(arguments)


def profile_launches(what: What, shape: Shape, dtype: str, device: torch.device) -> list[Launch]:
    """Every launch of one call, averaged over ``CALLS`` calls."""
    prepared = prepare(what, shape, dtype, device)
    (call,) = prepared.calls
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    for _ in range(WARM_UP):
        call()
    with profile(activities=activities, record_shapes=True) as recorded:
        for _ in range(CALLS):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize()
    events: Any = recorded.events()
    found: defaultdict[tuple[str, str], list[Any]] = defaultdict(list)
    for event in events:
        if event.device_type.name == "CPU" and microseconds(event, device):
            found[event.name, str(event.input_shapes)].append(event)
    if not found:
        raise SystemExit(f"expected launches on {device}, the profiler saw none")
    return [merge(group, device) for group in found.values()]


def prepare(what: What, shape: Shape, dtype: str, device: torch.device) -> Prepared:
    """The evaluation or the training step, ready to be called."""
    if what == "training":
        return prepare_step(Training(shape, dtype, device))
    return hoisted(Network(shape, dtype, device), None)


def total_work(what: What, shape: Shape, size: int) -> work.Work:
    """The work of one call; ``size`` is the bytes of an element of activations."""
    if what == "evaluation":
        return work.evaluation(shape.config, shape.batch, size)
    return step_work(shape, size)


def microseconds(event: Any, device: torch.device) -> float:
    """The time of an operator itself: of its kernels on a GPU, else of the host without callees."""
    if device.type == "cuda":
        return sum(kernel.duration for kernel in event.kernels)
    return event.self_cpu_time_total if "::" in event.name else 0.0


def merge(events: list[Any], device: torch.device) -> Launch:
    """One launch from the equal events of all calls."""
    kernels = [kernel.name for event in events for kernel in event.kernels]
    return Launch(
        op=events[0].name,
        shapes=[list(shape) for shape in events[0].input_shapes if shape],
        calls=len(events) / CALLS,
        seconds=sum(microseconds(event, device) for event in events) / 1e6 / CALLS,
        launches=len(kernels if device.type == "cuda" else events) / CALLS,
        kernels=sorted(set(kernels)),
    )


def count_work(launch: Launch, config: DiTConfig, batch: int, size: int) -> work.Work | None:
    """The work of one call, from its shapes; None for operators that are not counted."""
    name = launch.op.rpartition("::")[2]
    if name in ("mm", "addmm"):
        (rows, inner), (_, columns) = launch.shapes[-2:]
        elements = rows * inner + inner * columns + rows * columns
        return work.Work(2.0 * rows * inner * columns, elements * size)
    if name == "gemm_swiglu":
        *_, (columns, inner) = (shape for shape in launch.shapes if len(shape) == 2)
        rows = torch.Size(launch.shapes[0]).numel() // inner
        elements = rows * inner + inner * columns + rows * columns // 2
        return work.Work(2.0 * rows * inner * columns, elements * size)
    rows = [torch.Size(shape).numel() for shape in launch.shapes if len(shape) > 2]
    if rows and name in (moved := bytes_moved(size)):
        return work.Work(0.0, moved[name] * rows[0])
    if any(word in launch.op for word in ATTENTIONS):
        return work.attention(config, batch, size, backward="backward" in launch.op)
    return None


@cache
def bytes_moved(size: int) -> dict[str, float]:
    """For each operator of ours, the bytes that it moves for each element of its first rows."""
    dtype = next(dtype for dtype in DTYPES.values() if dtype.itemsize == size)
    found: dict[str, float] = {}
    for op in OPS.values():
        arguments = op.specimens(Sizes(dtype=dtype, device="meta"))[0]
        if op.flops(*arguments):
            continue  # products are counted from their shapes
        forward = op.work(*arguments)[1] / arguments[0].numel()
        found |= {op.name: forward, f"{op.name}_": forward}
        if op.backward is not None:
            results = op.fake(*arguments)
            gradients = results if isinstance(results, tuple) else (results,)
            first = next(x for x in (*gradients, *arguments) if x.dim() > 2)
            found[f"{op.name}_backward"] = op.work(*arguments, backward=True)[1] / first.numel()
    return found


if __name__ == "__main__":
    sys.exit(main())
