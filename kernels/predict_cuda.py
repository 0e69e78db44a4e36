"""Predicts how much of a copy's bandwidth the CUDA C++ kernels reach, from their machine code.

    python kernels/predict_cuda.py [--arch 80 90 100] [--op swiglu ...] [--width 768 ...]
        [--rows 16384 ...] [--json FILE]

Nothing is measured and no GPU is needed, but nvcc is. The launchers of ``csrc`` are built for the
chosen architectures, and over ``recorded_launches.cpp``, which writes down what they launch. Table
and file are those of ``predict_kernels.py``, for bf16.
"""

import argparse
import ctypes
import re
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from inspect_cuda import find_cuobjdump, readable, run
from inspect_kernels import ARCHS
from predict_kernels import (
    TOKENS,
    WIDTHS,
    Kernel,
    Predicted,
    label,
    report,
    row_traffic,
    rows_of,
)
from sass import Code, read
from static_model import DEVICES, Device, Launch, fraction, predict
from torch import Tensor

from blip3o_fast.ops import OPS, Impl, Op
from blip3o_fast.ops._record import as_tuple
from blip3o_fast.ops._registration import bind

HERE = Path(__file__).resolve().parent
CSRC = HERE / "csrc"
NAMESPACE = "blip3o_fast_recorded"
TARGETS = {80: "80", 90: "90a", 100: "100a"}
"""The machine code that each architecture loads, of the default targets of ``setup.py``."""

BFLOAT16 = 2
"""``BLIP3O_BFLOAT16``."""

CUDA = {name: op for name, op in OPS.items() if op.cuda is not None and op.triton}
NORMS = {"sandwich_norm": 1, "sandwich_join": 2}
"""Modulations of the ops whose backward has a second kernel, which adds partial sums."""


class Compiled(NamedTuple):
    """A kernel for one architecture; registers of a thread, shared bytes of a block."""

    registers: int
    shared: int
    sass: str


class Recorded(NamedTuple):
    """A launch: blocks of (x, y) threads, and the shared bytes that it gives each."""

    symbol: str
    blocks: int
    x: int
    y: int
    shared: int


class Shape(ctypes.Structure):
    """``blip3o_shape``."""

    _fields_ = [("batch", ctypes.c_int64), ("tokens", ctypes.c_int64), ("width", ctypes.c_int64)]


class Launchers:
    """The launchers of ``csrc``, built in ``folder``, and their machine code."""

    def __init__(self, folder: Path, archs: list[int]) -> None:
        self.path = build(folder, archs)
        torch.ops.load_library(self.path)
        self.library = ctypes.CDLL(str(self.path))
        self.library.blip3o_take_launches.restype = ctypes.c_char_p
        self.library.blip3o_sandwich_workspace.argtypes = [ctypes.c_int, Shape, ctypes.c_int]
        self.library.blip3o_sandwich_workspace.restype = ctypes.c_int64
        self.compiled = {arch: dict(compiled(self.path, TARGETS[arch])) for arch in archs}

    def on(self, arch: int) -> None:
        """Launch for a device of ``arch`` from now on."""
        self.library.blip3o_set_device(ARCHS.index(arch), DEVICES[arch].multiprocessors)

    def launches(self) -> list[Recorded]:
        """The launches since the last call."""
        lines = self.library.blip3o_take_launches().decode().splitlines()
        return [Recorded(name, *map(int, numbers)) for name, *numbers in map(str.split, lines)]

    def workspace(self, shape: Shape, modulations: int) -> int:
        """Bytes of partial sums."""
        return 4 * self.library.blip3o_sandwich_workspace(BFLOAT16, shape, modulations)


def build(folder: Path, archs: list[int]) -> Path:
    """The kernels for ``archs`` with launchers that record, as operators on CPU tensors."""
    home = Path(torch.__file__).parent
    sources = [*CSRC.glob("*.cu"), CSRC / "binding.cpp", HERE / "recorded_launches.cpp"]
    codes = [f"-gencode=arch=compute_{t},code=sm_{t}" for t in (TARGETS[arch] for arch in archs)]
    flags = ["-std=c++20", "-O3", "-Xcompiler=-fPIC", f"-I{home}/include", f"-I{CSRC}"]
    defined = ["USE_CUDA", "TORCH_TARGET_VERSION=0x020a000000000000", "BLIP3O_DISPATCH_KEY=CPU"]
    flags += [f"-D{name}" for name in (*defined, f"BLIP3O_NAMESPACE={NAMESPACE}")]

    def compile_one(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        run("nvcc", *flags, *codes, "-c", str(source), "-o", target)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    library = folder / "librecorded.so"
    link = ["-shared", "-Wl,-Bsymbolic", f"-L{home}/lib", "-Wl,--no-as-needed", "-ltorch"]
    run("g++", *objects, *link, "-o", str(library))
    return library


def compiled(library: Path, target: str) -> Iterator[tuple[str, Compiled]]:
    """Every kernel of the library for one target, by symbol."""
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        raise SystemExit("cuobjdump was not found; the CUDA toolkit and Triton bring it")
    arch = ("-arch", f"sm_{target}", str(library))
    usage = run(cuobjdump, "--dump-resource-usage", *arch)
    found = re.findall(r"Function (_Z\w+):\s*\n.*REG:(\d+).*SHARED:(\d+)", usage)
    numbers = {symbol: (int(registers), int(shared)) for symbol, registers, shared in found}
    for part in run(cuobjdump, "-sass", *arch).split("Function : ")[1:]:
        symbol, _, body = part.partition("\n")
        if "bfloat16" in symbol:
            yield symbol, Compiled(*numbers[symbol.strip()], body)


def predict_op(
    op: Op, width: int, rows: int, arch: int, launchers: Launchers
) -> Iterator[Predicted]:
    """Every operator of one op on its first specimen."""
    sizes = replace(
        WIDTHS[width], batch=rows // TOKENS, tokens=TOKENS, dtype=torch.bfloat16, device="meta"
    )
    device = DEVICES[arch]
    operators = op.fused[Impl.CUDA].operators
    specimens = 0
    for operator, given in op.calls(sizes, Impl.CUDA):
        specimens += operator.launcher == "forward"
        if specimens > 1:
            return
        if operator.launcher not in operators:
            continue
        launchers.launches()
        arguments = tuple(map(without_numbers, given))
        results = as_tuple(operators[operator.launcher](*arguments))
        launches = launchers.launches()
        stored, unavoidable = row_traffic(operator, arguments, results)
        sums = 0
        if len(launches) > 1:
            sums = launchers.workspace(Shape(sizes.batch, TOKENS, width), NORMS[op.name])
        # The first kernel moves the rows, a second one adds partial sums.
        others = bytes_of(results) - rows_of(results)
        moved = unavoidable - rows_of(arguments) + bytes_of(arguments) + sums
        work = (rows, stored, moved), (0, others, sums + others)
        kernels = [
            predict_launch(launch, launchers.compiled[arch], *of_kernel, device)
            for launch, of_kernel in zip(launches, work, strict=False)
        ]
        of_copy = fraction([k.prediction for k in kernels], unavoidable, device)
        seconds = unavoidable / device.bandwidth / of_copy
        name = label(op, operator, arguments)
        yield Predicted(name, width, rows, "bf16", arch, of_copy, seconds * 1e6, kernels)


counted = cache(read)


def without_numbers(x: object) -> object:
    """Memory of a tensor's sizes that nobody fills."""
    return torch.empty_like(x, device="cpu") if isinstance(x, Tensor) else x


def bytes_of(values: tuple[object, ...]) -> int:
    """Bytes of all tensors."""
    return sum(x.nbytes for x in values if isinstance(x, Tensor))


def predict_launch(
    launch: Recorded,
    compiled: dict[str, Compiled],
    rows: int,
    stored: int,
    traffic: int,
    device: Device,
) -> Kernel:
    """One kernel, which stores ``stored`` bytes of results for ``rows`` rows, or for none.

    Of its loops, that which stores most runs until a block's share is stored.
    """
    kernel = compiled[launch.symbol]
    num_warps = -(-launch.x * launch.y // 32)
    once, loops = counted(kernel.sass)
    loop = max(loops, key=lambda s: s.stored, default=None)
    trips = 1
    if loop is not None and loop.stored:
        trips = max(1, round(stored / launch.blocks / (loop.stored * num_warps)))
    facts = Launch(
        programs=launch.blocks,
        num_warps=num_warps,
        registers=kernel.registers,
        shared=kernel.shared + launch.shared,
        rows=round(rows / launch.blocks),
        trips=trips,
        row_stored=stored // max(1, rows),
        traffic=traffic,
    )
    code = Code(once, () if loop is None else (loop,))
    prediction = predict(code, facts, device)
    return Kernel(readable(launch.symbol), launch.blocks, kernel.registers, prediction)


def main() -> int:
    """Parse the command line, build, predict, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHS, default=[90])
    parser.add_argument("--op", nargs="+", choices=list(CUDA), default=list(CUDA))
    parser.add_argument("--width", type=int, nargs="+", choices=list(WIDTHS), default=list(WIDTHS))
    parser.add_argument("--rows", type=int, nargs="+", default=[16384], help=f"times {TOKENS}")
    parser.add_argument("--kernels", action="store_true", help="also print each kernel")
    parser.add_argument("--json", type=Path, help="also write all of it to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="blip3o-recorded-") as folder:
        launchers = Launchers(Path(folder), arguments.arch)
    for op in CUDA.values():
        op.fused[Impl.CUDA] = bind(op, NAMESPACE)
    found = []
    for arch in arguments.arch:
        launchers.on(arch)
        found += [
            predicted
            for width in arguments.width
            for rows in arguments.rows
            for name in arguments.op
            for predicted in predict_op(CUDA[name], width, rows, arch, launchers)
        ]
    report(found, kernels=arguments.kernels, path=arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
