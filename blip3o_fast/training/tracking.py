"""Where records go: ``metrics.jsonl`` always, TensorBoard and Weights & Biases by request.

A line of ``metrics.jsonl`` is ``{"kind": "step", ...}``, a ``StepRecord``, or
``{"kind": "validation", ...}``, a ``Validation``; what is not finite is null. When a run resumes,
the lines of steps that it repeats are removed, so the file looks like that of an uninterrupted run.
"""

import importlib.util
import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from blip3o_fast.atomic import json_text, write_atomically
from blip3o_fast.errors import OptionError
from blip3o_fast.installation import install
from blip3o_fast.options.train import TrainingOptions
from blip3o_fast.training.step_records import StepRecord
from blip3o_fast.training.validation import Validation

METRICS_NAME = "metrics.jsonl"
WANDB_ID_NAME = "wandb_run_id"
_FIELDS = {
    "step": tuple(StepRecord.__dataclass_fields__),
    "validation": tuple(n for n in Validation.__dataclass_fields__ if n != "above"),
}
_NEVER_NONE = frozenset(
    (
        *("step", "epoch", "samples", "skipped"),
        *("learning_rate", "loss_scale", "seconds", "data_wait"),
    )
)
_NUMBERS = (int, float, bool)
_VALUES = (*_NUMBERS, type(None))


class Tracker(Protocol):
    """Something that takes numbers at steps."""

    def log(self, step: int, group: str, values: Mapping[str, float]) -> None:
        """Take ``values`` of ``group`` (train or eval) after ``step`` steps."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


class MetricsFile:
    """Appends to ``metrics.jsonl``.

    Args:
        run: folder of the run.
        step: records of later steps are removed.
        validated: whether the validation after ``step`` counts as done.
    """

    def __init__(self, run: Path, step: int, *, validated: bool) -> None:
        self.path = run / METRICS_NAME
        kept = [
            record
            for record in read_metrics(run)
            if record["step"] < step
            or (record["step"] == step and (validated or record["kind"] == "step"))
        ]
        write_atomically(self.path, "".join(_line(record) for record in kept).encode())
        self._file = self.path.open("a", encoding="utf-8")

    def step(self, record: StepRecord) -> None:
        """Append a step."""
        self._file.write(_line({"kind": "step", **record.to_dict()}))

    def validation(self, record: Validation) -> None:
        """Append a validation."""
        self._file.write(_line({"kind": "validation", **record.to_dict()}))

    def flush(self) -> None:
        """Hand the lines to the operating system."""
        try:
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, f"cannot write {METRICS_NAME}: {error.strerror}") from error

    def close(self) -> None:
        """Flush and close."""
        self.flush()
        self._file.close()


class TensorBoard:
    """Writes event files into the run's folder."""

    def __init__(self, run: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, group: str, values: Mapping[str, float]) -> None:
        """One scalar per value."""
        for name, value in values.items():
            self._writer.add_scalar(f"{group}/{name}", value, step)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class WeightsAndBiases:
    """Logs to one run of Weights & Biases, the same one after a resume."""

    def __init__(self, run: Path, options: TrainingOptions) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        name = run / WANDB_ID_NAME
        if not name.is_file():
            write_atomically(name, secrets.token_hex(8).encode())
        self._run = wandb.init(
            project=options.wandb_project,
            name=options.wandb_run_name,
            id=name.read_text(encoding="utf-8"),
            resume="allow",
            dir=str(run),
            config=options.to_dict(),
        )

    def log(self, step: int, group: str, values: Mapping[str, float]) -> None:
        """All values of a step at once."""
        self._run.log({f"{group}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        """Upload what is left."""
        self._run.finish()


def require_trackers(options: TrainingOptions) -> None:
    """Raise ``OptionError``, naming the extra, if a tracker that is asked for is not installed."""
    for name, package in (("use_tensorboard", "tensorboard"), ("use_wandb", "wandb")):
        if getattr(options, name) and importlib.util.find_spec(package) is None:
            raise OptionError(
                f"{name}: expected {package}, which is not installed: {install('logging')}"
            )


def open_trackers(run: Path, options: TrainingOptions, step: int) -> list[Tracker]:
    """The trackers that the options ask for."""
    trackers: list[Tracker] = []
    if options.use_tensorboard:
        trackers.append(TensorBoard(run, step))
    if options.use_wandb:
        trackers.append(WeightsAndBiases(run, options))
    return trackers


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The records of a run, up to the first line that a crash left incomplete.

    Raises:
        ValueError: naming the file, if a whole line is no record.
    """
    path = run / METRICS_NAME
    records: list[dict[str, Any]] = []
    for line in path.read_bytes().split(b"\n")[:-1] if path.is_file() else []:
        try:
            record = json.loads(line, parse_constant=lambda _: None)
        except (ValueError, RecursionError):
            break
        if not _is_record(record):
            expected = "a record of a step or of a validation"
            raise ValueError(f"{path}: line {len(records) + 1}: expected {expected}")
        records.append(record)
    return records


def _is_record(record: Any) -> bool:
    """Whether a line says what the lines of this library say."""
    kind = record.get("kind") if isinstance(record, dict) else None
    return isinstance(kind, str) and all(
        type(record.get(name, "")) in (_NUMBERS if name in _NEVER_NONE else _VALUES)
        for name in _FIELDS.get(kind, ("kind",))
    )


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The entries that are numbers, without the step."""
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "step"
    }


def _line(record: Mapping[str, Any]) -> str:
    return json_text(record) + "\n"
