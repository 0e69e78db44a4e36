"""A run of the benchmarks as data: what was measured where, what was not, and why."""

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
    the least time that the task could take at the ceilings of the same run. ``bound`` says which of
    them decides: ``memory``, ``compute`` or ``transfer``. ``host``, ``warm`` and ``queued`` are as
    in ``clock.Timing``, ``rotation`` as in ``watch.Prepared``. ``median`` is cold unless
    ``rotation`` is 0. ``peak`` is the most bytes that a call allocates (None on a CPU).
    ``predicted`` is the fraction of the limit that ``predictions`` expects, None without one.
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
    predicted: float | None = None

    @property
    def key(self) -> tuple[str, str, str, str, str]:
        """No two measurements of a run have the same key."""
        return self.group, self.name, self.shape, self.dtype, self.contender

    @property
    def fraction(self) -> float:
        """The limit over the time: 1 is as fast as this device allows."""
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
        failures: what was not measured because this library or the run failed, and how. Older
            records have none.
        predictions: for which device and from what the predicted fractions are; empty on a CPU.
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
    predictions: str = ""

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
