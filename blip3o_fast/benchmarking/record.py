"""A run of the benchmarks as data: what was measured where, and what was left out and why."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip3o_fast.atomic import write_json
from blip3o_fast.checked import check, from_json, read_json

FORMAT = 1
KIND = "blip3o-fast benchmarks"


@dataclass(frozen=True)
class Measurement:
    """One contender at one task.

    Times are seconds of the task; ``low`` and ``high`` are quintiles of the samples. ``limit`` is
    the least time that this device, as measured in the same run, could take; ``bound`` says whether
    that is ``memory``, ``compute`` or ``transfer``. ``host``, ``warm`` and ``queued`` are those of
    ``clock.Timing``, ``rotation`` that of ``watch.Prepared``: ``median`` is cold where it is
    not 0. ``peak`` is what a call allocates at most beyond what was there before it, in bytes (None
    on a CPU).
    """

    group: str
    name: str
    shape: str
    dtype: str
    contender: str
    ours: bool
    median: float
    low: float
    high: float
    samples: int
    flops: float
    bytes: float
    transfer: float
    limit: float
    bound: str
    batch: int = 0
    rotation: int = 0
    host: float | None = None
    warm: float | None = None
    peak: int | None = None
    queued: bool | None = None

    @property
    def key(self) -> tuple[str, str, str, str, str]:
        """What tells measurements of a run apart."""
        return self.group, self.name, self.shape, self.dtype, self.contender

    @property
    def fraction(self) -> float:
        """Of the limit: 1 is as fast as this device can."""
        return self.limit / self.median


@dataclass(frozen=True)
class Record:
    """A whole run.

    Attributes:
        settings: what was asked for.
        environment: as ``describe_environment`` gives it.
        bandwidth: bytes per second of a copy, measured in this run.
        rates: flops per second of a matrix product, by dtype, measured in this run.
        transfer: bytes per second that the host delivers to the device, measured in this run.
        peers: every peer: its version, or ``absent: `` and the reason.
        measurements: in the order in which they were made.
        left_out: what was not measured, and why.
        failures: what was not measured by a fault of this library or of the run, and why; records
            of older versions have none, since a failure left no record.
    """

    settings: dict[str, Any]
    environment: dict[str, Any]
    bandwidth: float
    rates: dict[str, float]
    transfer: float
    peers: dict[str, str]
    measurements: tuple[Measurement, ...]
    left_out: dict[str, str]
    failures: dict[str, str] = dataclasses.field(default_factory=dict[str, str])

    def write(self, path: Path) -> None:
        """Write the file whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"kind": KIND, "format": FORMAT, **dataclasses.asdict(self)})


def read_record(path: str | Path) -> Record:
    """A record from its file.

    Raises:
        ValueError: naming the file and what is wrong with it.
        OSError: if it cannot be read.
    """
    content = read_json(Path(path))
    if content.get("kind") != KIND:
        raise ValueError(f"{path}: expected the kind {KIND!r}, as blip3o-fast bench writes it")
    if content.get("format") != FORMAT:
        raise ValueError(f"{path}: expected format {FORMAT}, got {content.get('format')!r}")
    fields = {name: value for name, value in content.items() if name not in ("kind", "format")}
    try:
        record = from_json(Record, fields, "record")
        check(record)
        for measurement in record.measurements:
            check(measurement)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    keys = [m.key for m in record.measurements]
    if len(set(keys)) != len(keys):
        raise ValueError(f"{path}: expected each measurement once, got duplicates")
    return record
