"""Predicts how much of a copy's bandwidth every Triton kernel reaches, from its machine code.

    python kernels/predict_kernels.py [--arch 90] [--dtype bf16] [--op swiglu ...]
        [--width 768 ...] [--rows 16384 ...] [--json FILE]
    python kernels/predict_kernels.py --bench

Nothing is measured: ``static_model.py`` says what is counted and what is assumed. No GPU is needed.
A line is one call of an operator on the first specimen of its record; its kernels follow with
``--kernels``. "Fraction" is of the bandwidth of a copy of the same rows.

``--bench`` predicts what ``blip3o-fast bench`` times on a GPU, for every GPU, and writes the file
that ``bench`` prints beside its measurements. It takes two minutes.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import triton
from blip3o_kernels import launch as row_launch
from inspect_kernels import (
    ARCHS,
    BASE,
    FUSED,
    PRECISIONS,
    Compiled,
    calls,
    compiling_for,
    cuobjdump,
    resources,
)
from sass import Code, read
from static_model import DEVICES, GPUS, Device, Launch, Prediction, fraction, predict
from torch import Tensor

from blip3o_fast.atomic import write_json
from blip3o_fast.benchmarking.environment import describe_commit
from blip3o_fast.benchmarking.op_cases import op_tasks, sizes_of
from blip3o_fast.benchmarking.predictions import PREDICTIONS, kernels_digest
from blip3o_fast.benchmarking.selection import OP_SHAPES
from blip3o_fast.benchmarking.shapes import Shape
from blip3o_fast.ops import Op, Sizes
from blip3o_fast.ops._record import Arguments, Operator, as_tuple
from blip3o_fast.report.columns import align

ROW_OPS = [name for name, op in FUSED.items() if not op.combines]
"""The ops that memory bounds, unlike a matrix product."""

TOKENS = 256
WIDTHS = {
    768: replace(BASE, inner=2048),
    1024: replace(BASE, width=1024, inner=2816, heads=16, adapter=2986, padded=3072),
    1536: replace(BASE, width=1536, inner=4096, heads=24, kv_heads=8, adapter=1877, padded=1920),
    2048: replace(BASE, width=2048, inner=5632, heads=32, kv_heads=8, adapter=1322, padded=1408),
}
"""Sizes by width: base, three wider models, and the four widths of base's adapter."""


class Kernel(NamedTuple):
    """One launch; registers are those of a thread."""

    name: str
    programs: int
    registers: int
    prediction: Prediction


class Predicted(NamedTuple):
    """One call of an operator, and its kernels in order."""

    operator: str
    width: int
    rows: int
    precision: str
    arch: int
    fraction: float
    microseconds: float
    kernels: list[Kernel]


def main() -> int:
    """Parse the command line, predict, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHS, default=[90])
    parser.add_argument("--dtype", nargs="+", choices=list(PRECISIONS), default=["bf16"])
    parser.add_argument("--op", nargs="+", choices=ROW_OPS, default=ROW_OPS)
    parser.add_argument("--width", type=int, nargs="+", choices=list(WIDTHS), default=list(WIDTHS))
    parser.add_argument("--rows", type=int, nargs="+", default=[16384], help=f"times {TOKENS}")
    parser.add_argument("--kernels", action="store_true", help="also print each kernel")
    parser.add_argument("--json", type=Path, help="also write all of it to this file")
    parser.add_argument("--bench", action="store_true", help="what bench times; no other options")
    arguments = parser.parse_args()
    if arguments.bench:
        write_json(PREDICTIONS, predict_bench())
        return 0
    found = [
        predicted
        for arch in arguments.arch
        for precision in arguments.dtype
        for width in arguments.width
        for rows in arguments.rows
        for name in arguments.op
        for predicted in predict_op(FUSED[name], sizes_at(width, rows, precision), arch)
    ]
    report(found, kernels=arguments.kernels, path=arguments.json)
    return 0


def predict_bench() -> dict[str, object]:
    """The content of ``PREDICTIONS``: of every GPU, the fractions by shape and task."""
    commit, changed = describe_commit()
    return {
        "about": "Predicted by kernels/predict_kernels.py --bench, not measured: which fraction of "
        "the bandwidth of a copy each op reaches with Triton in bf16, where blip3o-fast bench "
        "times it. Bandwidths and clocks of the GPUs are assumed.",
        "commit": commit,
        "changed": changed,
        "kernels": kernels_digest(),
        "triton": triton.__version__,
        "gpus": [
            {
                "name": name,
                "architecture": arch,
                "bandwidth": device.bandwidth,
                "fractions": {
                    shape.name: dict(predict_tasks(shape, arch, device)) for shape in OP_SHAPES
                },
            }
            for name, (arch, device) in GPUS.items()
        ],
    }


def predict_tasks(shape: Shape, arch: int, device: Device) -> Iterator[tuple[str, object]]:
    """What each op that ``arch`` can run reaches, forward and with the gradient of everything."""
    sizes = sizes_of(shape, torch.bfloat16, "meta")
    for op, backward, task in op_tasks(shape, "bf16"):
        name = op.name + ("_backward" if backward else "")
        for found in predict_op(op, sizes, arch, device, only=name):
            if found.operator == name:
                kernels = [k.prediction for k in found.kernels]
                yield task.name, shortened(fraction(kernels, int(task.work.bytes), device))


def sizes_at(width: int, rows: int, precision: str) -> Sizes:
    """Sizes of one line of the table."""
    activation, parameter = PRECISIONS[precision]
    return replace(
        WIDTHS[width],
        batch=rows // TOKENS,
        tokens=TOKENS,
        dtype=activation,
        parameter_dtype=parameter,
    )


def predict_op(
    op: Op, sizes: Sizes, arch: int, device: Device | None = None, *, only: str = ""
) -> Iterator[Predicted]:
    """Every operator of one op, or ``only`` one, on its first specimen.

    ``device`` is one of ``arch``; None is that of ``DEVICES``.
    """
    device = device or DEVICES[arch]
    row_launch.MULTIPROCESSORS = device.multiprocessors
    rows = sizes.batch * sizes.tokens
    dtypes = (sizes.dtype, sizes.parameter_dtype or sizes.dtype)
    precision = next(name for name, pair in PRECISIONS.items() if pair == dtypes)
    specimens = 0
    for operator, launcher, arguments in calls(op, sizes, arch):
        specimens += operator.launcher == "forward"
        if specimens > 1:
            return
        if only and operator.name != only:
            continue
        with compiling_for(arch) as launches:
            results = as_tuple(launcher(*arguments))
        stored, unavoidable = row_traffic(operator, arguments, results)
        kernels = [predict_launch(launch, stored // rows, device) for launch in launches]
        of_copy = fraction([k.prediction for k in kernels], unavoidable, device)
        seconds = unavoidable / device.bandwidth / of_copy
        name = label(op, operator, arguments)
        yield Predicted(name, sizes.width, rows, precision, arch, of_copy, seconds * 1e6, kernels)


def row_traffic(operator: Operator, arguments: Arguments, results: Arguments) -> tuple[int, int]:
    """Bytes of rows that a call stores, and those that it reads or stores.

    An operator without results writes its first argument in place, which it also reads, or its
    last, which is then among the arguments already.
    """
    inplace = operator.launcher == "forward_"
    stored = rows_of(results or (arguments[:1] if inplace else arguments[-1:]))
    return stored, rows_of(arguments) + (stored if results or inplace else 0)


def label(op: Op, operator: Operator, arguments: Arguments) -> str:
    """The name of an operator, and whether its call leaves out the gradients of parameters."""
    name = operator.name
    if operator.launcher == "backward" and op.backward and op.backward.chooses:
        name += "" if arguments[-1] else ", inputs only"
    return name


def rows_of(tensors: Arguments) -> int:
    """Bytes of all rows of activations."""
    return sum(x.nbytes for x in tensors if isinstance(x, Tensor) and x.dim() > 2)


def predict_launch(launch: Compiled, row_stored: int, device: Device) -> Kernel:
    """One kernel of an operator that writes ``row_stored`` bytes a row."""
    registers, _ = resources(launch.cubin)
    walks = "chunks" in launch.integers and "rows" in launch.integers
    facts = Launch(
        programs=launch.programs,
        num_warps=launch.num_warps,
        registers=registers,
        shared=launch.shared,
        rows=launch.integers["rows"] if walks else 0,
        trips=trips_of_sums(launch.integers),
        row_stored=row_stored,
        traffic=launch.traffic,
    )
    name = f"{launch.name} {launch.variant}".strip()
    return Kernel(name, launch.programs, registers, predict(code_of(launch.cubin), facts, device))


def trips_of_sums(integers: dict[str, int]) -> int:
    """How often the longest program of a stage adds partial sums; 0 where that is not known."""
    if "SAMPLES" in integers:
        return -(-integers["samples"] // integers["SAMPLES"])
    if "ROWS" not in integers or "COLS" not in integers:
        return 0
    count = integers.get("samples", 1) * integers.get("chunks", 1)
    return -(-integers.get("count", count) // integers["ROWS"])


@cache
def code_of(cubin: bytes) -> Code:
    """The machine code of a cubin, counted."""
    return read(cuobjdump(cubin, "--dump-sass"))


def report(found: list[Predicted], *, kernels: bool, path: Path | None) -> None:
    """Print the table, and write the file if there is a path."""
    sys.stdout.write("\n".join(table(found, kernels=kernels)) + "\n")
    if path is not None:
        path.write_text(json.dumps(list(map(as_json, found)), separators=(",", ":")) + "\n")


def table(found: list[Predicted], *, kernels: bool) -> list[str]:
    """A line for each operator; with ``kernels``, one for each of its kernels."""
    head = ["operator", "width", "rows", "dtype", "arch", "fraction", "us", "binds"]
    detail = [
        "registers",
        "resident",
        "waves",
        "instructions",
        "issue",
        "latency",
        "in flight",
        "barriers",
    ]
    lines = [[*head, *detail]]
    for p in found:
        longest = max(p.kernels, key=lambda k: k.prediction.seconds)
        shown = p.kernels if kernels else [longest]
        whole = [p.operator, p.width, p.rows, p.precision, p.arch, f"{p.fraction:.0%}"]
        lines.append([*map(str, whole), f"{p.microseconds:.1f}", *of_kernel(longest)])
        if len(p.kernels) > 1 and kernels:
            for k in shown:
                one = [f"  {k.name}", "", "", "", "", "", f"{k.prediction.seconds * 1e6:.1f}"]
                lines.append([*one, *of_kernel(k)])
    return align(lines)


def of_kernel(kernel: Kernel) -> list[str]:
    """The columns of one kernel."""
    p = kernel.prediction
    return [
        p.binds,
        str(kernel.registers),
        str(p.resident),
        f"{p.waves:.2f}",
        f"{p.instructions:.0f}",
        f"{p.issue:.0%}",
        f"{p.latency:.0%}",
        f"{p.in_flight / 1024:.0f} KB",
        f"{p.barriers:.1f}",
    ]


def as_json(p: Predicted) -> dict[str, object]:
    """One call for the file."""
    kernels = [
        {
            "kernel": k.name,
            "programs": k.programs,
            "registers": k.registers,
            **{name: shortened(x) for name, x in k.prediction._asdict().items()},
        }
        for k in p.kernels
    ]
    return {
        **p._asdict(),
        "fraction": shortened(p.fraction),
        "microseconds": shortened(p.microseconds),
        "kernels": kernels,
    }


def shortened(x: object) -> object:
    """Four digits of a number."""
    return float(f"{x:.4g}") if isinstance(x, float) else x


if __name__ == "__main__":
    sys.exit(main())
