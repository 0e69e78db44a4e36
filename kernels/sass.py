"""Reads SASS as cuobjdump prints it: instructions, loops, and how long one warp takes alone.

Used by ``static_model.py``, which says what is counted.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

MEMORY = 1200
CACHED = 40
"""Clocks from a load to its data: in memory under load (0.7 us), and in L1."""

STEADY = 12
"""Trips of a loop that are averaged: a multiple of the batches that may be under way."""

LANES = {"alu": 64, "mufu": 16, "convert": 64, "lsu": 32, "fp64": 32}
"""Lanes of a unit, in results a clock and multiprocessor. That of "fma" is ``Device.fp32``."""

UNITS = (
    ("mufu", r"MUFU|I2F|F2I|F2F(?!P)"),
    ("convert", r"F2FP|I2I|I2IP|F2IP"),
    ("lsu", r"LD|ST|SHFL|RED|ATOM|BAR|MATCH"),
    ("fp64", r"D(ADD|MUL|FMA|SETP)"),
    ("fma", r"FADD|FMUL|FFMA|IMAD|HFMA2|HADD2|HMUL2"),
    ("branch", r"BRA|EXIT|BSYNC|BSSY|WARPSYNC|NOP|RET|CALL|ULDC|U[A-Z]|S2|R2U|CS2R|DEPBAR"),
    ("alu", r""),
)
"""The unit that executes an opcode: the first whose pattern it begins with."""


READY = {"mufu": 20, "convert": 8, "lsu": 28, "fp64": 16, "fma": 4, "alu": 5, "branch": 12}
"""Clocks from an instruction to its result."""


class Instruction(NamedTuple):
    """One line of SASS.

    Attributes:
        target: the address that a branch goes to.
        pending: batches of copies to shared memory that a wait leaves under way.
        unit: that executes it.
        reads, writes: registers and predicates.
    """

    address: int
    opcode: str
    target: int | None
    pending: int | None
    unit: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]


class Section(NamedTuple):
    """Code that runs as a whole; counts are of one warp and one trip.

    Attributes:
        instructions: issued.
        units: of them, by unit.
        loaded, stored: bytes of global memory, of all 32 threads.
        barriers: waits for the other warps of a program.
        alone: clocks of a warp that has the multiprocessor to itself.
    """

    instructions: int
    units: Counter[str]
    loaded: int
    stored: int
    barriers: int
    alone: int


class Code(NamedTuple):
    """A kernel: what runs once, and its outermost loops."""

    once: Section
    loops: tuple[Section, ...]


LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?(\w+)\s+)?([A-Z][\w.]*)([^;]*);")
REGISTER = re.compile(r"\b(U?R|U?P)(\d+)(\.64)?\b")


def instructions(sass: str) -> list[Instruction]:
    """The instructions of one function, as cuobjdump prints them."""
    found = []
    for address, guard, opcode, operands in LINE.findall(sass):
        goes = re.search(r"0x([0-9a-f]+)\s*$", operands) if opcode.startswith("BRA") else None
        if opcode == "NOP" or (goes and goes[1] == address.lstrip("0")):
            continue
        waits = re.search(r"SB0, 0x([0-9a-f]+)\s*$", operands) if opcode == "DEPBAR.LE" else None
        unit = next(unit for unit, pattern in UNITS if re.match(pattern, opcode))
        parts = operands.split(",")
        results = 0 if re.match("ST|BRA|BAR|EXIT|RED|LDGSTS", opcode) else 1
        # Carries and comparisons have a second result, and a shuffle says first whether it worked.
        results += results and any(re.match(r"\s*U?P[T\d]", part) for part in parts[:2])
        wide = max(1, width(opcode) // 4 if "128" in opcode or ".64" in opcode else 1)
        wide = max(wide, 2 if re.match("IMAD.WIDE|CS2R", opcode) else 1)
        writes = [name for part in parts[:results] for name in registers(part, wide)]
        reads = [
            name for part in parts[results:] for name in registers(part, 1 if results else wide)
        ]
        found.append(
            Instruction(
                int(address, 16),
                opcode,
                int(goes[1], 16) if goes else None,
                int(waits[1], 16) if waits else None,
                unit,
                (*reads, guard) if guard else tuple(reads),
                tuple(writes),
            )
        )
    return found


def registers(operand: str, count: int) -> list[str]:
    """The registers of an operand, ``count`` of them for each that is named; addresses have two."""
    return [
        f"{kind}{int(number) + i}"
        for kind, number, pair in REGISTER.findall(operand)
        for i in range(2 if pair else 1 if "[" in operand else count)
    ]


def read(sass: str) -> Code:
    """Cut a function at its backward branches."""
    lines = instructions(sass)
    spans: list[tuple[int, int]] = []
    for line in lines:
        if line.target is not None and line.target < line.address:
            spans = [s for s in spans if s[0] < line.target or s[1] > line.address]
            if not any(s[0] <= line.target and line.address <= s[1] for s in spans):
                spans.append((line.target, line.address))
    inside = [[x for x in lines if first <= x.address <= last] for first, last in spans]
    once = [x for x in lines if not any(first <= x.address <= last for first, last in spans)]
    return Code(section(once, again=False), tuple(section(loop, again=True) for loop in inside))


def section(lines: Sequence[Instruction], *, again: bool) -> Section:
    """Count instructions; ``again`` says that they are a loop."""
    return Section(
        len(lines),
        Counter(line.unit for line in lines),
        sum(32 * width(x.opcode) for x in lines if re.match(r"LDG(STS)?\.", x.opcode)),
        sum(32 * width(x.opcode) for x in lines if x.opcode.startswith("STG")),
        sum(x.opcode.startswith("BAR") for x in lines),
        (alone(lines, 2 + STEADY) - alone(lines, 2)) // STEADY if again else alone(lines, 1),
    )


def alone(lines: Sequence[Instruction], trips: int) -> int:
    """Clocks in which one warp issues ``lines``, ``trips`` times in a row, in order."""
    ready: dict[str, int] = {}
    free: dict[str, int] = {}
    from_memory: dict[str, int] = {}
    arrives = 0
    batches: list[int] = []
    clock = 0
    for trip in range(trips):
        waited = False
        for line in lines:
            start = max(
                clock + 1, free.get(line.unit, 0), *(ready.get(r, 0) for r in line.reads), 0
            )
            waited = waited or any(from_memory.get(r) == trip for r in line.reads)
            free[line.unit] = start + 128 // min(LANES.get(line.unit, 128), 128)
            clock = start + (READY["lsu"] if line.opcode.startswith("BAR") else 0)
            if line.opcode.startswith("LDGSTS"):
                arrives = start + MEMORY
            elif line.opcode == "LDGDEPBAR":
                batches.append(arrives)
            elif line.pending is not None and line.pending < len(batches):
                clock = max(clock, batches[-1 - line.pending])
            memory = line.opcode.startswith("LDG")
            wait = READY[line.unit] if not memory else CACHED if waited else MEMORY
            for name in line.writes:
                ready[name] = start + wait
                from_memory.pop(name, None)
                if memory:
                    from_memory[name] = trip
    return clock


def width(opcode: str) -> int:
    """Bytes of one thread's access."""
    if wide := re.search(r"\.(128|64)\b", opcode):
        return int(wide[1]) // 8
    return 1 if re.search(r"\.[US]8\b", opcode) else 2 if re.search(r"\.[US]16\b", opcode) else 4
