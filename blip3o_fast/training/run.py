"""From options to a trained model in a folder."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip3o_fast.data.atomic import write_atomically
from blip3o_fast.errors import OptionError
from blip3o_fast.training.checkpoints import damaged_checkpoints
from blip3o_fast.training.distributed import World, join_world
from blip3o_fast.training.options import TrainingOptions
from blip3o_fast.training.plan import Plan, choose_device, make_plan
from blip3o_fast.training.tracking import METRICS_NAME, read_metrics
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
        best: the best validation, None if there was none.
        losses: (step, loss) of every step, from the run's beginning.
        validations: every validation as recorded.
        seconds: of training, over all processes that continued one another.
    """

    folder: Path
    steps: int
    best: Validation | None
    losses: tuple[tuple[int, float], ...]
    validations: tuple[dict[str, Any], ...]
    seconds: float


def train(options: TrainingOptions, *, on_step: OnStep | None = None) -> TrainingResult:
    """Train, or go on with the run in ``options.output_dir``.

    Args:
        options: what to do.
        on_step: called with the record of every step, on the main process.

    Raises:
        OptionError: before any step, naming what cannot work.
        TrainingInterrupted: after saving, on a signal.
        NonFiniteGradients: if training has broken down.
        OSError: if something cannot be written.
    """
    with join_world(options.parallel, choose_device(options)) as world:
        plan = make_plan(options, world)
        if world.is_main:
            claim_folder(plan)
        world.barrier()
        trainer = Trainer(plan, world, on_step)
        trainer.run()
        return _summarise(plan, trainer, world)


def claim_folder(plan: Plan) -> None:
    """Make the run's folder, or check that it holds this very run.

    Raises:
        OptionError: if it holds another run, naming the options that differ; if ``resume`` is off
            and it holds any; or if its checkpoints are damaged.
    """
    options = plan.options
    folder = Path(options.output_dir)
    path = folder / OPTIONS_NAME
    saved: dict[str, Any] = {}
    if path.is_file():
        saved = json.loads(path.read_text(encoding="utf-8"))
        if not options.resume:
            raise OptionError(f"output_dir: {folder} holds a run; expected a new folder, or resume")
        changed = options.changes(saved["options"])
        changed.pop("chunked_embeddings_dir", None)
        if changed:
            listed = ", ".join(f"{n} was {a!r}, is {b!r}" for n, (a, b) in changed.items())
            raise OptionError(f"output_dir: {folder} holds another run: {listed}")
        if saved["data"] != plan.data_digest:
            raise OptionError(f"output_dir: {folder} holds a run on other data or another split")
        damaged = damaged_checkpoints(folder)
        if damaged:
            raise OptionError(
                f"output_dir: {folder}: damaged {', '.join(damaged)}; delete them to go on before"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise OptionError(f"output_dir: expected an empty folder or a run, got files in {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    content = {"options": options.to_dict(), "data": plan.data_digest, "plan": plan.describe()}
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def _summarise(plan: Plan, trainer: Trainer, world: World) -> TrainingResult:
    folder = Path(plan.options.output_dir)
    records = read_metrics(folder)
    steps = [record for record in records if record["kind"] == "step"]
    validations = tuple(record for record in records if record["kind"] == "validation")
    progress = trainer.state.progress
    result = TrainingResult(
        folder,
        progress.step,
        progress.best,
        tuple((r["step"], r["loss"]) for r in steps if r["loss"] is not None),
        validations,
        progress.seconds,
    )
    if world.is_main:
        summary = {
            "steps": result.steps,
            "best": None if result.best is None else result.best.to_dict(),
            "seconds": result.seconds,
            "samples_per_second": result.steps
            * plan.options.batch_size
            / max(result.seconds, 1e-9),
            "data_wait_seconds": sum(record["data_wait"] for record in steps),
            "clipped_steps": sum(_clipped(record) for record in steps),
            "skipped_steps": sum(record["skipped"] for record in steps),
            "metrics": METRICS_NAME,
        }
        write_atomically(folder / SUMMARY_NAME, (json.dumps(summary, indent=1) + "\n").encode())
    return result


def _clipped(record: dict[str, Any]) -> bool:
    norm, bound = record["grad_norm"], record["clip_bound"]
    return norm is not None and bound is not None and norm > bound
