"""The comparison of a run with an earlier one, with a band for noise.

A figure has changed if its ratio to the old one is above ``1 + band`` or below ``1 / (1 + band)``.
The band is the larger of ``LEAST_BAND`` and twice the spread, (high - low) / median, of either run.
It is wider on a CPU, which other processes share.
"""

from dataclasses import dataclass

from blip3o_fast.benchmarking.record import Measurement, Record

LEAST_BAND = {"cuda": 0.05, "cpu": 0.15}
SPREADS = 2.0


@dataclass(frozen=True)
class Change:
    """One figure in both runs. ``ratio`` is new over old: 2 is twice as slow."""

    old: Measurement
    new: Measurement
    band: float

    @property
    def ratio(self) -> float:
        """New over old."""
        return self.new.median / self.old.median

    @property
    def verdict(self) -> str:
        """``slower``, ``faster`` or ``same``."""
        if self.ratio > 1 + self.band:
            return "slower"
        return "faster" if self.ratio < 1 / (1 + self.band) else "same"

    @property
    def is_regression(self) -> bool:
        """Whether this library got slower."""
        return self.new.ours and self.verdict == "slower"


@dataclass(frozen=True)
class Comparison:
    """Changes in the order of the new run, and the figures that only one run has."""

    changes: tuple[Change, ...]
    gone: tuple[str, ...]
    added: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def regressions(self) -> tuple[Change, ...]:
        """Figures of this library that got worse by more than noise."""
        return tuple(change for change in self.changes if change.is_regression)


def check_device(old: Record, device: str) -> None:
    """Raise ``ValueError`` unless ``old`` was measured on ``device``."""
    before = old.environment["device"]
    if before != device:
        raise ValueError(
            f"compare: expected a record of this device, {device}, got one of {before}; times of "
            "different devices do not compare"
        )


def compare(old: Record, new: Record) -> Comparison:
    """Compare two runs on one kind of device. Groups that ``new`` did not run do not count as gone.

    Raises:
        ValueError: if the devices differ, or nothing was measured in both.
    """
    check_device(old, new.environment["device"])
    least = LEAST_BAND[new.environment["device_type"]]
    earlier = {m.key: m for m in old.measurements if m.group in new.settings["groups"]}
    changes = tuple(
        Change(earlier[m.key], m, noise_band(earlier[m.key], m, least))
        for m in new.measurements
        if m.key in earlier
    )
    if not changes:
        raise ValueError("compare: expected measurements in common, found none")
    keys = {m.key for m in new.measurements}
    return Comparison(
        changes,
        gone=tuple(", ".join(key) for key in earlier if key not in keys),
        added=tuple(", ".join(m.key) for m in new.measurements if m.key not in earlier),
        warnings=tuple(_drift(old, new, least)),
    )


def noise_band(old: Measurement, new: Measurement, least: float) -> float:
    """The relative change that may be noise."""
    spreads = ((m.high - m.low) / m.median for m in (old, new))
    return max(least, SPREADS * max(spreads))


def _drift(old: Record, new: Record, least: float) -> list[str]:
    """A warning if the device itself was faster or slower, so that no figure says much."""
    found: list[str] = []
    pairs = [
        ("copy bandwidth", old.bandwidth, new.bandwidth),
        ("transfer rate", old.transfer, new.transfer),
    ]
    pairs += [
        (f"GEMM rate in {dtype}", old.rates[dtype], rate)
        for dtype, rate in new.rates.items()
        if dtype in old.rates
    ]
    for name, before, now in pairs:
        if not 1 / (1 + least) <= now / before <= 1 + least:
            found.append(f"the {name} of the device itself changed by {now / before - 1:+.0%}")
    return found
