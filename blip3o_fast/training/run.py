"""From options to a trained model in a folder."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip3o_fast.atomic import (
    TEMPORARY_SUFFIX,
    locked,
    remove_leftovers,
    write_atomically,
    write_json,
)
from blip3o_fast.checked import read_json
from blip3o_fast.data.verified import verify_once
from blip3o_fast.devices import find_device
from blip3o_fast.errors import OptionError
from blip3o_fast.options.train import TrainingOptions
from blip3o_fast.processes import World, join_world
from blip3o_fast.training.checkpoints import BEST, LATEST, damaged_checkpoints
from blip3o_fast.training.randomness import determinism
from blip3o_fast.training.run_page import REPORT_NAME, render_page
from blip3o_fast.training.run_plan import TrainingPlan, make_plan
from blip3o_fast.training.summary import summarise
from blip3o_fast.training.tracking import METRICS_NAME, read_metrics, require_trackers
from blip3o_fast.training.trainer import OnStep, Trainer
from blip3o_fast.training.validation import Validation

OPTIONS_NAME = "options.json"
SUMMARY_NAME = "summary.json"


@dataclass(frozen=True)
class TrainingResult:
    """What a finished run left.

    Attributes:
        folder: of the run; ``BLIP3oDiT.from_pretrained`` loads its best checkpoint.
        steps: optimizer steps taken.
        before: those of them that earlier processes of the same run had taken.
        best: the best validation, None if there was none.
        losses: (step, loss) of every step, from the run's beginning.
        validations: every validation as recorded.
        seconds: of training, including earlier processes of the same run.
    """

    folder: Path
    steps: int
    before: int
    best: Validation | None
    losses: tuple[tuple[int, float], ...]
    validations: tuple[dict[str, Any], ...]
    seconds: float


def prepare(options: TrainingOptions, world: World) -> TrainingPlan:
    """Check everything that can be checked before the first step, without writing anything.

    Raises:
        OptionError: naming what cannot work.
    """
    require_trackers(options)
    plan = make_plan(options, world)
    check_folder(plan)
    return plan


def train(options: TrainingOptions, *, on_step: OnStep | None = None) -> TrainingResult:
    """Train, or go on with the run in ``options.output_dir``.

    Args:
        options: what to do.
        on_step: called with the record of every step, on the main process.

    Raises:
        OptionError: before any step, naming what cannot work.
        TrainingInterrupted: after saving, on a signal.
        NonFiniteGradients: if training has broken down.
        ValueError: naming the shard, the row and the key, if a sample holds NaN or Inf.
        OSError: if something cannot be written.
    """
    with (
        join_world(options.parallel, find_device(options.device)) as world,
        determinism(options.deterministic),
    ):
        plan = prepare(options, world)
        world.barrier()  # every process checks the folder before it is claimed
        with claimed(plan) if world.is_main else nullcontext():
            world.barrier()
            shards = plan.train.manifest.shards[: options.max_shards]
            verify_once(plan.train.folder, shards, Path(options.output_dir), world)
            trainer = Trainer(plan, world, on_step)
            try:
                trainer.run()
            except BaseException:
                if world.is_main:
                    with suppress(OSError, ValueError):  # what stopped the run says more
                        write_summary(plan, trainer)
                raise
            if world.is_main:
                write_summary(plan, trainer)
            world.barrier()
        progress = trainer.state.progress
        records = read_metrics(Path(options.output_dir))
        steps = (record for record in records if record["kind"] == "step")
        return TrainingResult(
            Path(options.output_dir),
            progress.step,
            trainer.before,
            progress.best,
            tuple((r["step"], r["loss"]) for r in steps if r["loss"] is not None),
            tuple(record for record in records if record["kind"] == "validation"),
            progress.seconds,
        )


def check_folder(plan: TrainingPlan) -> None:
    """Check that the run's folder is free, or holds this very run.

    Raises:
        OptionError: if it holds another run, naming the options that differ; if ``resume`` is off
            and it holds any; or if its checkpoints are damaged.
    """
    options = plan.options
    folder = Path(options.output_dir)
    path = folder / OPTIONS_NAME
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"output_dir: expected a folder, got the file {folder}")
    if not path.is_file():
        if folder.exists() and not all(is_leftover(entry) for entry in folder.iterdir()):
            raise OptionError(
                f"output_dir: expected an empty folder or a run, got files in {folder}"
            )
        return
    if not options.resume:
        raise OptionError(f"output_dir: {folder} holds a run; expected a new folder, or resume")
    saved = _read_saved(path)
    changed = options.changes(saved["options"])
    changed.pop("chunked_embeddings_dir", None)
    if changed:
        listed = ", ".join(f"{n} was {a!r}, is {b!r}" for n, (a, b) in changed.items())
        raise OptionError(
            f"output_dir: {folder} holds another run: {listed}; choose another folder or remove it"
        )
    if saved["data"] != plan.data_digest:
        raise OptionError(f"output_dir: {folder} holds a run on other data or another split")
    damaged = damaged_checkpoints(folder)
    if damaged:
        raise OptionError(
            f"output_dir: {folder}: damaged {', '.join(damaged)}; delete them to go on before"
        )


@contextmanager
def claimed(plan: TrainingPlan) -> Iterator[None]:
    """Make the run's folder, record the options in it, and lock it inside the block.

    Raises:
        OptionError: if another process is training in it, as after a job was queued twice.
    """
    folder = Path(plan.options.output_dir)
    with locked(folder):
        _describe(plan, folder)
        yield


def _describe(plan: TrainingPlan, folder: Path) -> None:
    for name in (OPTIONS_NAME, METRICS_NAME, SUMMARY_NAME, REPORT_NAME, LATEST, BEST):
        remove_leftovers(folder, name)
    content = {
        "options": plan.options.to_dict(),
        "data": plan.data_digest,
        "plan": plan.describe(),
    }
    write_json(folder / OPTIONS_NAME, content)


def is_leftover(path: Path) -> bool:
    """Whether a file is one that a killed process left behind."""
    return path.name.startswith(f".{OPTIONS_NAME}.") and path.suffix == TEMPORARY_SUFFIX


def write_summary(plan: TrainingPlan, trainer: Trainer) -> None:
    """Write ``summary.json`` and, unless that is off, ``report.html``."""
    folder = Path(plan.options.output_dir)
    records = read_metrics(folder)
    progress = trainer.state.progress
    summary = summarise(
        records,
        total_steps=plan.total_steps,
        batch_size=plan.options.batch_size,
        seconds=progress.seconds,
    )
    summary["best"] = None if progress.best is None else progress.best.to_dict()
    write_json(folder / SUMMARY_NAME, summary)
    if plan.options.report:
        title = f"Training: {folder.resolve().name}"
        page = render_page(title, records, summary, plan.options.to_dict(), plan.describe())
        write_atomically(folder / REPORT_NAME, page.encode())


def _read_saved(path: Path) -> dict[str, Any]:
    try:
        saved = read_json(path)
        if isinstance(saved["options"], dict) and isinstance(saved["data"], str):
            return saved
    except (ValueError, KeyError, TypeError):
        pass
    raise OptionError(f"output_dir: {path} is damaged; restore it, or choose another folder")
