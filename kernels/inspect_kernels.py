"""Compiles every Triton kernel for several GPUs, which need not be present, and checks the code.

    python kernels/inspect_kernels.py [--arch 80 90 100] [--dtype bf16 ...] [--op swiglu ...]

Each operator of each op is called on the specimens of its record, on CPU tensors. A driver that
names a target replaces that of a GPU, so kernels are compiled but not launched. The table shows
registers, stack (spills and local arrays), shared memory, 16-byte loads and stores, and unwanted
instructions: fp64 arithmetic below fp64, local memory, atomics. Exits with 1 if a kernel has one of
these, spills, or moves the rows of an aligned width by less than 16 bytes at a time (8 for rows of
e4m3, which sm_80 does not have).
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "0"
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from blip3o_fast.ops import OPS, Op, Sizes
from blip3o_fast.ops._record import Arguments, Operator
from blip3o_fast.report.columns import align

ARCHS = (80, 90, 100)
E4M3_ARCH = 89
"""The first architecture that converts to e4m3."""

TMA_ARCH = 90
"""The first architecture with TMA."""

BASE = Sizes(
    batch=2,
    tokens=256,
    width=768,
    inner=3072,
    channels=1024,
    heads=12,
    kv_heads=4,
    head_width=64,
    adapter=3541,
    padded=3584,
)
"""The sizes of the published base model, with a wider MLP."""

FUSED = {name: op for name, op in OPS.items() if op.triton}


class Precision(NamedTuple):
    """Dtypes of activations and of parameters."""

    activation: torch.dtype
    parameter: torch.dtype


PRECISIONS = {
    "bf16": Precision(torch.bfloat16, torch.bfloat16),
    "bf16/fp32": Precision(torch.bfloat16, torch.float32),
    "fp16": Precision(torch.float16, torch.float16),
    "fp32": Precision(torch.float32, torch.float32),
}


class Report(NamedTuple):
    """One compiled kernel.

    ``tma`` counts loads and stores of tiles, ``products`` those of a whole warp group on tensor
    cores, and ``waited`` those that a warp of sm_90 waits for before its next one.
    """

    op: str
    kernel: str
    variant: str
    precision: str
    arch: int
    num_warps: int
    registers: int
    stack: int
    shared: int
    wide_loads: int
    wide_stores: int
    half_loads: int
    half_stores: int
    tma: int
    products: int
    waited: int
    fp64: int
    local: int
    atomics: int


class Compiled(NamedTuple):
    """A launch, and its kernel as Triton compiled it.

    Attributes:
        programs: the grid.
        traffic: bytes of all tensors that it takes, each read or written once.
        integers: the arguments that are numbers, by name.
    """

    name: str
    variant: str
    num_warps: int
    shared: int
    ptx: str
    cubin: bytes
    programs: int
    traffic: int
    integers: dict[str, int]


class _TargetDriver:
    """Replaces the driver of a GPU, and names the architecture to compile for."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        del device
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


@contextmanager
def compiling_for(arch: int) -> Iterator[list[Compiled]]:
    """Launches inside are compiled for ``arch`` and collected, and do not run."""
    found: list[Compiled] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        del warmup
        kernel = run(self, *args, grid=(1,), warmup=True, **kwargs)
        variant = "+".join(name.lower() for name, value in kwargs.items() if value is True)
        module = self.fn.__module__.rpartition(".")[2]
        named = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        launch = Compiled(
            f"{module}.{self.fn.__name__.strip('_')}",
            variant,
            kernel.metadata.num_warps,
            kernel.metadata.shared,
            kernel.asm["ptx"],
            kernel.asm["cubin"],
            grid[0],
            sum(x.nbytes for x in args if isinstance(x, torch.Tensor)),
            {name: x for name, x in named.items() if type(x) is int},
        )
        found.append(launch)
        return kernel

    JITFunction.run = compile_only
    driver.set_active(_TargetDriver(arch))
    try:
        yield found
    finally:
        JITFunction.run = run


@cache
def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread."""
    text = cuobjdump(cubin, "--dump-resource-usage")
    usage = re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", text)
    if usage is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text!r}")
    registers, stack, local = (int(number) for number in usage.groups())
    return registers, stack + local


def cuobjdump(cubin: bytes, option: str) -> str:
    """What NVIDIA's tool prints about a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def report(op: str, precision: str, arch: int, kernel: Compiled) -> Report:
    """The report of one kernel, from its PTX and its cubin."""
    registers, stack = resources(kernel.cubin)
    sass = cuobjdump(kernel.cubin, "--dump-sass") if "wgmma" in kernel.ptx else ""
    return Report(
        op=op,
        kernel=kernel.name,
        variant=kernel.variant,
        precision=precision,
        arch=arch,
        num_warps=kernel.num_warps,
        registers=registers,
        stack=stack,
        shared=kernel.shared,
        wide_loads=len(re.findall(r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64", kernel.ptx)),
        wide_stores=len(re.findall(r"st\.global\S*\.v4\.b32|st\.global\S*\.v2\.b64", kernel.ptx)),
        half_loads=len(re.findall(r"ld\.global\S*\.v2\.b32|ld\.global\S*\.b64", kernel.ptx)),
        half_stores=len(re.findall(r"st\.global\S*\.v2\.b32|st\.global\.b64", kernel.ptx)),
        tma=kernel.ptx.count("cp.async.bulk.tensor"),
        products=len(re.findall(r"wgmma\.mma_async|tcgen05\.mma", kernel.ptx)),
        waited=len(re.findall(r"HGMMA[^;]*gsb0", sass)),
        fp64=kernel.ptx.count(".f64"),
        local=len(re.findall(r"\.local\b", kernel.ptx)),
        atomics=len(re.findall(r"\b(?:atom|red)\.", kernel.ptx)),
    )


def problems(reports: list[Report]) -> list[str]:
    """Every broken rule, one a line."""
    found: list[str] = []
    for r in reports:
        rules = {
            "fp64 arithmetic": r.fp64 > 0,
            "local memory": r.local > 0 or r.stack > 0,
            "atomics": r.atomics > 0,
            "no 16-byte load": not (r.wide_loads or r.tma or _is_stage(r) or _is_narrow(r)),
            "no 16-byte store": not (
                r.wide_stores or r.tma or _is_stage(r) or _is_quantised(r) or _is_narrow(r)
            ),
            "no 8-byte load": _is_narrow(r) and not (r.wide_loads or r.half_loads),
            "every product is waited for": r.products > 0 and r.waited == r.products,
            "no 8-byte store": (_is_quantised(r) or _is_narrow(r))
            and not (r.wide_stores or r.half_stores),
        }
        name = f"{r.kernel} {r.variant or 'plain'} {r.precision} sm_{r.arch}"
        found += [f"{name}: {rule}" for rule, broken in rules.items() if broken]
    return found


def _is_stage(report: Report) -> bool:
    """Whether a kernel adds partial sums; all others move rows of activations."""
    return report.kernel.endswith("_stage")


def _is_narrow(report: Report) -> bool:
    """Whether two warps share a row of base, so that a thread has four columns of each piece."""
    return report.kernel == "sandwich_join.backward_kernel"


def _is_quantised(report: Report) -> bool:
    return "quantised" in report.variant.split("+")


def inspect(ops: list[Op], precisions: list[str], archs: list[int]) -> list[Report]:
    """The reports of the chosen ops, precisions and architectures."""
    reports: list[Report] = []
    for arch in archs:
        for precision in precisions:
            dtype, parameter_dtype = PRECISIONS[precision]
            sizes = replace(BASE, dtype=dtype, parameter_dtype=parameter_dtype)
            for op in ops:
                with compiling_for(arch) as launches:
                    for _, launcher, arguments in calls(op, sizes, arch):
                        launcher(*arguments)
                kernels = {id(launch.cubin): launch for launch in launches}.values()
                reports += [report(op.name, precision, arch, kernel) for kernel in kernels]
    return reports


def calls(op: Op, sizes: Sizes, arch: int) -> Iterator[tuple[Operator, Any, Arguments]]:
    """Every operator of ``op`` that ``arch`` can run, its launcher, and arguments by specimen.

    The arguments are on the device ``meta``: nothing runs, so they need no memory.
    """
    module = importlib.import_module(f"blip3o_kernels.{op.name}")
    with compiling_for(arch):
        given = list(op.calls(replace(sizes, device="meta")))
    for operator, arguments in given:
        if runs(op, operator, arguments[0], arch):
            yield operator, getattr(module, operator.launcher), arguments


def runs(op: Op, operator: Operator, x: torch.Tensor, arch: int) -> bool:
    """Whether ``arch`` has what an operator needs, and the op takes tensors like ``x``."""
    if operator.launcher == "forward_quantised":
        return arch >= E4M3_ARCH
    if op.name == "gemm_swiglu" and arch < TMA_ARCH:
        return False
    return op.triton is not None and op.triton(x) is None


def main() -> int:
    """Parse the command line, inspect, print."""
    parser = argparse.ArgumentParser(description="Compile every kernel without a GPU.")
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHS), help="80 90 100 ...")
    parser.add_argument(
        "--dtype", nargs="+", choices=list(PRECISIONS), default=list(PRECISIONS), help="precisions"
    )
    parser.add_argument("--op", nargs="+", choices=list(FUSED), default=list(FUSED), help="ops")
    parser.add_argument("--json", type=Path, help="also write the reports to this file")
    arguments = parser.parse_args()
    reports = inspect([FUSED[name] for name in arguments.op], arguments.dtype, arguments.arch)
    lines = align([Report._fields, *([str(x) for x in r] for r in reports)])
    sys.stdout.write("\n".join(lines) + "\n")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([r._asdict() for r in reports], indent=1))
    wrong = problems(reports)
    sys.stdout.write("".join(f"{line}\n" for line in wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
