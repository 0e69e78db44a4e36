"""Records of steps, copied to the host for several steps at a time.

A step leaves nine numbers in a small tensor on the device. ``Recorder.flush`` copies those of all
steps since the last flush at once. Only then does the host wait for the device.
"""

import time
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blip3o_fast.data.dataset import BatchRecords
from blip3o_fast.processes import World

LOSS_TERMS = ("loss", "velocity_loss", "semantic_loss", "cosine_loss", "consistency_loss")


class NonFiniteGradients(ValueError):
    """Too many consecutive steps had NaN or Inf gradients."""


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step.

    Attributes:
        step: counted from 1.
        epoch: counted from 0.
        loss: weighted sum of the four terms that follow, mean over the global batch.
        grad_norm: global norm of the unscaled gradients before clipping; None if not finite.
        clip_bound: the bound that it was held to; None without clipping.
        skipped: whether NaN or Inf gradients made the step leave the weights as they were.
        learning_rate: of the step.
        loss_scale: of the loss scaler; 1 without one.
        seconds: mean duration of the steps since the last flush.
        data_wait: seconds that this step waited for its batch.
    """

    step: int
    epoch: int
    loss: float | None
    velocity_loss: float | None
    semantic_loss: float | None
    cosine_loss: float | None
    consistency_loss: float | None
    grad_norm: float | None
    clip_bound: float | None
    skipped: bool
    learning_rate: float
    loss_scale: float
    seconds: float
    data_wait: float

    @property
    def clipped(self) -> bool:
        """Whether clipping shortened the gradients."""
        return (
            self.grad_norm is not None
            and self.clip_bound is not None
            and self.grad_norm > self.clip_bound
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; NaN and Inf are None."""
        return asdict(self)


class Pending(NamedTuple):
    """A step whose numbers are still on the device.

    ``numbers`` are the five loss terms, norm, bound, finite and loss scale, ``[9]`` fp32.
    ``records`` are read only if an error names the batch.
    """

    step: int
    epoch: int
    learning_rate: float
    data_wait: float
    numbers: Tensor
    records: BatchRecords


class Recorder:
    """Collects steps and watches for gradients that stay non-finite.

    Args:
        world: the processes whose loss terms are averaged.
        max_nonfinite: consecutive steps that may be skipped.
        scaled: whether there is a loss scaler; its overflows are normal.
    """

    def __init__(self, world: World, *, max_nonfinite: int, scaled: bool) -> None:
        self.world = world
        self.max_nonfinite = max_nonfinite
        self.scaled = scaled
        self.pending: list[Pending] = []
        self.bad_keys: list[tuple[int, tuple[str, ...]]] = []
        self._since = time.perf_counter()

    def restart_clock(self) -> None:
        """Exclude the time since the last flush from the durations of the next steps."""
        self._since = time.perf_counter()

    def flush(self) -> list[StepRecord]:
        """Wait for the device and return the steps since the last flush.

        Raises:
            NonFiniteGradients: naming the keys of the batches, if too many steps in a row failed.
        """
        if not self.pending:
            return []
        numbers = torch.stack([entry.numbers for entry in self.pending])
        if self.world.size > 1:
            terms = len(LOSS_TERMS)
            means = self.world.sum(numbers[:, :terms].contiguous()) / self.world.size
            numbers = torch.cat((means, numbers[:, terms:]), dim=1)
        rows: list[list[float]] = numbers.tolist()
        now = time.perf_counter()
        seconds = (now - self._since) / len(self.pending)
        self._since = now
        entries, self.pending = self.pending, []
        records = [_record(entry, row, seconds) for entry, row in zip(entries, rows, strict=True)]
        for entry, record in zip(entries, records, strict=True):
            self._watch(entry, record)
        return records

    def _watch(self, entry: Pending, record: StepRecord) -> None:
        if not record.skipped:
            self.bad_keys.clear()
            return
        if self.scaled and record.loss_scale > 1:
            return  # the scaler halves its scale; only the model's own overflow remains at 1
        self.bad_keys.append((entry.step, tuple(record.key for record in entry.records.read())))
        if len(self.bad_keys) <= self.max_nonfinite:
            return
        batches = [
            f"step {step}: {', '.join(keys)}"
            for rank in self.world.gather(self.bad_keys)
            for step, keys in rank
        ]
        raise NonFiniteGradients(
            f"NaN or Inf gradients in {len(self.bad_keys)} consecutive steps, expected at most "
            f"{self.max_nonfinite}; lower learning_rate or look at the data of {'; '.join(batches)}"
        )


def _record(entry: Pending, row: list[float], seconds: float) -> StepRecord:
    terms = [_finite(value) for value in row[: len(LOSS_TERMS)]]
    norm, bound, finite, scale = row[len(LOSS_TERMS) :]
    return StepRecord(
        entry.step,
        entry.epoch,
        *terms,
        grad_norm=_finite(norm),
        clip_bound=_finite(bound),
        skipped=finite == 0,
        learning_rate=entry.learning_rate,
        loss_scale=scale,
        seconds=seconds,
        data_wait=entry.data_wait,
    )


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None
