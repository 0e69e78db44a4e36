"""Prints registers, spills and 16-byte accesses of every kernel that nvcc compiled.

    python kernels/inspect_cuda.py [LIBRARY] [--arch sm_90a ...] [--json FILE]

No GPU is needed. LIBRARY is the CUDA build, by default that of the installed package. Marks kernels
that use local memory, fp64 or atomics, and vectorised kernels without 16-byte loads and stores.
Exits with 1 if there are any.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

OPCODE = r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]+)"
TYPES = {"f": "fp32", "6__half": "fp16", "13__nv_bfloat16": "bf16"}


class Report(NamedTuple):
    """One kernel for one target."""

    kernel: str
    arch: str
    registers: int
    stack: int
    shared: int
    wide_loads: int
    wide_stores: int
    local: int
    fp64: int
    atomics: int

    @property
    def vectorised(self) -> bool:
        """Whether the kernel is for rows that allow 16-byte accesses."""
        first = next((a for a in self.arguments if a not in TYPES.values()), "")
        return first in ("true", "4", "8")

    @property
    def arguments(self) -> list[str]:
        """Template arguments: dtypes, then whether or how many elements share an access."""
        return self.kernel.partition("<")[2].rstrip(">").split(", ")

    @property
    def faults(self) -> str:
        """Unwanted instructions, and missing 16-byte accesses."""
        found = [name for name in ("stack", "local", "fp64", "atomics") if getattr(self, name)]
        if self.vectorised and not (self.wide_loads and self.wide_stores):
            found.append("no 16-byte access")
        return ", ".join(found)


def find_cuobjdump() -> str | None:
    """NVIDIA's disassembler, from the CUDA toolkit or from Triton."""
    triton = find_spec("triton")
    homes = triton.submodule_search_locations if triton else None
    places = ["cuobjdump", "/usr/local/cuda/bin/cuobjdump"]
    places += [f"{home}/backends/nvidia/bin/cuobjdump" for home in homes or ()]
    return next((found for place in places if (found := shutil.which(place))), None)


def inspect(library: Path, cuobjdump: str, archs: list[str] | None = None) -> Iterator[Report]:
    """Every kernel of ``library``, for the named targets or for all that it holds."""
    for arch in archs or targets(library, cuobjdump):
        usage = run(cuobjdump, "--dump-resource-usage", "-arch", arch, str(library))
        code = instructions(run(cuobjdump, "-sass", "-arch", arch, str(library)))
        for symbol, facts in re.findall(r"Function (_Z\w+):\s*\n\s*(.*)", usage):
            numbers = dict(re.findall(r"(\w+):(\d+)", facts))
            yield Report(
                readable(symbol),
                arch,
                int(numbers["REG"]),
                int(numbers["STACK"]),
                int(numbers["SHARED"]),
                *count(code.get(symbol, [])),
            )


def targets(library: Path, cuobjdump: str) -> list[str]:
    """The targets that the library holds machine code for."""
    listed = run(cuobjdump, "--list-elf", str(library))
    return sorted(set(re.findall(r"sm_\w+(?=\.cubin)", listed)), key=lambda s: (len(s), s))


def run(*command: str) -> str:
    """The output of a program."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions(sass: str) -> dict[str, list[str]]:
    """Opcodes of every function."""
    found: dict[str, list[str]] = {}
    for part in sass.split("Function : ")[1:]:
        symbol, _, body = part.partition("\n")
        found[symbol.strip()] = re.findall(OPCODE, body)
    return found


def count(opcodes: list[str]) -> tuple[int, int, int, int, int]:
    """(16-byte loads, 16-byte stores, local memory, fp64, atomics) among ``opcodes``."""
    patterns = (
        r"LDG(STS)?\..*128",
        r"STG\..*128",
        r"(LDL|STL)",
        r"(DADD|DMUL|DFMA|DSETP|MUFU\.\w*64|F2F\.F64|F2F\.F32\.F64)",
        r"(ATOM|ATOMG|RED)\b",
    )
    of = [sum(re.match(pattern, op) is not None for op in opcodes) for pattern in patterns]
    return of[0], of[1], of[2], of[3], of[4]


def readable(symbol: str) -> str:
    """``join_forward<bf16, fp32, true, false>`` from a mangled name of an anonymous namespace."""
    match = re.search(r"_cu_[0-9a-f]{8}(?:_\d+)?(\d{1,2})([a-z_]+)I", symbol)
    if match is None:
        return symbol
    arguments, rest, last = [], symbol[match.end() :], ""
    pattern = re.compile(r"L([bi])(\d+)E|S\w?_|f|6__half|13__nv_bfloat16")
    while token := pattern.match(rest):
        text = token[0]
        if token[1] == "b":
            arguments.append("true" if token[2] == "1" else "false")
        elif token[1] == "i":
            arguments.append(token[2])
        else:
            last = TYPES.get(text, last)
            arguments.append(last)
        rest = rest[token.end() :]
    return f"{match[2]}<{', '.join(arguments)}>"


def default_library() -> Path | None:
    """The CUDA build of the installed package."""
    package = find_spec("blip3o_fast")
    homes = (package.submodule_search_locations if package else None) or ()
    return next((path for home in homes if (path := Path(home) / "_C.so").is_file()), None)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("library", type=Path, nargs="?", default=default_library())
    parser.add_argument("--arch", nargs="+", help="targets such as sm_90a; default: all it holds")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    cuobjdump = find_cuobjdump()
    if options.library is None or not options.library.is_file():
        parser.error(f"LIBRARY: expected a CUDA build, got {options.library}; see setup.py")
    if cuobjdump is None:
        parser.error("cuobjdump was not found; the CUDA toolkit and Triton bring it")
    rows = sorted(inspect(options.library, cuobjdump, options.arch))
    width = max((len(row.kernel) for row in rows), default=0)
    head = "arch      regs  stack  shared  ld.128  st.128  local  fp64  atomics"
    lines = [f"{'kernel':<{width}}  {head}"]
    for r in rows:
        lines.append(
            f"{r.kernel:<{width}}  {r.arch:<8}  {r.registers:>4}  {r.stack:>5}  {r.shared:>6}  "
            f"{r.wide_loads:>6}  {r.wide_stores:>6}  {r.local:>5}  {r.fp64:>4}  {r.atomics:>7}  "
            f"{r.faults}".rstrip()
        )
    sys.stdout.write("\n".join(lines) + "\n")
    if options.json:
        options.json.write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n")
    return int(any(row.faults for row in rows))


if __name__ == "__main__":
    sys.exit(main())
