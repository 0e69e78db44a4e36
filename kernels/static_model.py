"""What machine code and a launch say about the speed of a memory-bound kernel. It is a prediction.

Nothing here is measured. A kernel that moves rows takes at least as long as a copy of the same
bytes. The model says which fraction of the copy's bandwidth it reaches, and what holds it back.

**Counting.** SASS is cut at its backward branches. A loop is what lies between target and branch,
the rest runs once a program. The loop over rows is that which stores most; the bytes that it
stores say how many rows ptxas unrolled. Branches forward are counted as not taken. Instructions are
counted by the unit that executes them (``sass.UNITS``).

**One warp alone** issues in order. An instruction starts one clock after the one before it, once
its unit is free and its registers are ready, ``READY`` clocks after their instruction started.
Loads of global memory take ``MEMORY`` clocks, and ``CACHED`` once the same trip of the loop has
waited for one: later loads are of parameters, or of rows that were read before. Copies to shared
memory take as long, until a wait for their batch. ``alone`` is the time of a trip in the steady
state, times the trips.

**One multiprocessor** holds R programs of W warps, as registers, shared memory, warps and programs
allow. With n instructions of a warp and program, n_unit of them for a unit, R programs take

    memory   their bytes / (bandwidth of a copy / multiprocessors)
    busy     R W n / 4 for the issue of four schedulers; R W 32 n_unit / lanes for the fullest unit;
             128 bytes of global memory a clock through L1
    latency  alone

and together ``(memory^4 + busy^4 + latency^4)^(1/4)``, since limits that are close slow each other
down: one at 80% of the memory's time costs a tenth. Programs run in waves of R on every
multiprocessor. The last wave is smaller: its memory takes less time, its latency does not.

**One op** is its kernels in order, with ``LAUNCH`` between two. Its fraction is the time of a copy
that moves the unavoidable bytes of the op, over this time.

**Left out**: the clock under load, bank conflicts, parts of sectors, L2 (which can hold small
tensors), and the ramps of a launch (a copy has them too). Rates are those of the CUDA programming
guide ("Throughput of Native Arithmetic Instructions"), bandwidths those usual for a copy; latencies
and the power of four are judgement. The first measurement is to test them.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from sass import LANES, MEMORY, Code, Section

LAUNCH = 1e-6
"""Seconds between two kernels of a stream."""


class Device(NamedTuple):
    """One GPU: multiprocessors, clock in Hz, bandwidth of a copy in B/s, and what one holds."""

    multiprocessors: int
    clock: float
    bandwidth: float
    fp32: int
    shared: int
    warps: int = 64
    programs: int = 32
    registers: int = 65536


DEVICES = {
    80: Device(108, 1.41e9, 1.75e12, fp32=64, shared=164 * 1024),
    90: Device(132, 1.755e9, 3.0e12, fp32=128, shared=228 * 1024),
    100: Device(148, 1.85e9, 7.0e12, fp32=128, shared=228 * 1024),
}
"""A100 80 GB, H100 SXM and B200, by architecture."""

GPUS = {
    "A100": (80, DEVICES[80]),
    "H100": (90, DEVICES[90]),
    "H200": (90, DEVICES[90]._replace(bandwidth=4.2e12)),
    "B200": (100, DEVICES[100]),
}
"""Architecture and device by name: an H200 is an H100 with more bandwidth."""


class Launch(NamedTuple):
    """How a kernel is launched.

    Attributes:
        programs: the grid.
        num_warps: of a program.
        registers: of a thread.
        shared: bytes of a program.
        rows: that a program walks; 0 for a kernel that does not walk rows. Its loops, if it has
            any, then read its share of ``traffic``.
        trips: of the loops; 0 where rows or traffic tell.
        row_stored: bytes of a row's results.
        traffic: bytes that the kernel must move in all, without repeated reads from cache.
    """

    programs: int
    num_warps: int
    registers: int
    shared: int
    rows: int
    trips: int
    row_stored: int
    traffic: int


class Prediction(NamedTuple):
    """One kernel on one device; times in seconds.

    Attributes:
        seconds: predicted.
        copy: a copy of ``Launch.traffic`` bytes.
        binds: the largest of memory, issue, a unit and latency; "tail" if whole waves are not it.
        instructions: issued a row by all warps of a program, or by a program without rows.
        issue, unit: their clocks over those of memory.
        latency: clocks of one program alone over those of the memory of all resident ones.
        resident: programs on a multiprocessor.
        in_flight: bytes of their first loads of a trip; ``needed`` is latency times bandwidth.
        waves: programs over resident ones.
        barriers: a row.
    """

    seconds: float
    copy: float
    binds: str
    instructions: float
    issue: float
    unit: float
    latency: float
    resident: int
    in_flight: int
    needed: int
    waves: float
    barriers: float

    @property
    def fraction(self) -> float:
        """Of the bandwidth of a copy."""
        return self.copy / self.seconds


def resident(device: Device, launch: Launch) -> int:
    """Programs that one multiprocessor holds."""
    of_warp = 32 * (-(-launch.registers // 8) * 8)
    return min(
        device.programs,
        device.warps // launch.num_warps,
        device.registers // of_warp // launch.num_warps,
        device.shared // (launch.shared + 1024),
    )


def looped(code: Code, launch: Launch) -> list[tuple[Section, float]]:
    """The loops, and how often one program runs each."""
    if launch.rows and code.loops and not launch.trips:
        loop = max(code.loops, key=lambda s: (s.stored, s.instructions))
        at_once = max(1, loop.stored * launch.num_warps // max(1, launch.row_stored))
        return [(loop, launch.rows / min(at_once, launch.rows))]
    a_trip = sum(loop.loaded for loop in code.loops) * launch.num_warps
    share = launch.traffic / launch.programs
    trips = launch.trips or math.ceil(share / max(1, a_trip))
    return [(loop, trips) for loop in code.loops]


def predict(code: Code, launch: Launch, device: Device) -> Prediction:
    """The time of one kernel."""
    parts = [(code.once, 1.0), *looped(code, launch)]

    def total(of: str) -> float:
        return sum(getattr(part, of) * times for part, times in parts)

    lanes = {**LANES, "fma": device.fp32}
    units = {
        unit: sum(part.units[unit] * times for part, times in parts) * 32 / count
        for unit, count in lanes.items()
    }
    units["lsu"] = max(units["lsu"], (total("loaded") + total("stored")) / 128)
    unit = max(units, key=lambda name: units[name])
    issue = launch.num_warps * total("instructions") / 4
    work = {"issue": issue, unit: launch.num_warps * units[unit]}
    by_itself = total("alone")
    per_clock = device.bandwidth / device.multiprocessors / device.clock
    held = resident(device, launch)
    moved = launch.traffic / launch.programs / per_clock
    busy = max(work, key=lambda name: work[name])

    def together(programs: float) -> float:
        limits = (programs * moved, math.ceil(programs) * work[busy], by_itself)
        return sum(x**4 for x in limits) ** 0.25

    waves = launch.programs / (held * device.multiprocessors)
    rest = launch.programs - int(waves) * held * device.multiprocessors
    clocks = int(waves) * together(held)
    last = together(rest / device.multiprocessors) if rest else 0.0
    memory = max(held * moved, 1e-9)
    full = min(held, launch.programs / device.multiprocessors)
    limits = {"memory": full * moved, busy: full * work[busy], "latency": by_itself}
    binds = max(limits, key=lambda name: limits[name])
    if waves > 1 and last > 1.5 * (waves % 1) * together(held) and last > 0.1 * (clocks + last):
        binds = f"{binds}, tail"
    taken = max(1, launch.rows)
    body = parts[-1][0]
    return Prediction(
        seconds=(clocks + last) / device.clock,
        copy=launch.traffic / device.bandwidth,
        binds=binds,
        instructions=launch.num_warps * total("instructions") / taken,
        issue=issue / max(moved, 1e-9),
        unit=work[unit] / max(moved, 1e-9),
        latency=by_itself / memory,
        resident=held,
        in_flight=held * launch.num_warps * body.loaded,
        needed=int(MEMORY * per_clock),
        waves=waves,
        barriers=total("barriers") / taken,
    )


def fraction(kernels: Sequence[Prediction], nbytes: int, device: Device) -> float:
    """What an op of these kernels reaches of the copy of its unavoidable bytes."""
    seconds = sum(k.seconds for k in kernels) + LAUNCH * (len(kernels) - 1)
    return nbytes / device.bandwidth / seconds
