"""The training loop.

    for each step of the plan
        take a batch, one optimizer step                   OptimizerStep
        at some steps: record, validate, save              Trainer.train

The host does not wait for the device inside a step. It waits when records are copied: every
``log_every_n_steps`` on CUDA, every step on a CPU, where waiting is free.
"""

import math
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from blip3o_fast.checkpoint import check_tensors
from blip3o_fast.data.loader import Loader
from blip3o_fast.pretrained import BLIP3oDiT
from blip3o_fast.processes import World
from blip3o_fast.signals import STOPPED, StopSignals
from blip3o_fast.training import checkpoints
from blip3o_fast.training.clipping import AdaptiveClipper
from blip3o_fast.training.distributed import spread
from blip3o_fast.training.ema import WeightAverage
from blip3o_fast.training.optimizer import make_optimizer
from blip3o_fast.training.progress import ProgressDisplay
from blip3o_fast.training.randomness import seed_everything
from blip3o_fast.training.run_plan import TrainingPlan
from blip3o_fast.training.state import Progress, TrainingState
from blip3o_fast.training.step import OptimizerStep
from blip3o_fast.training.step_records import Pending, Recorder, StepRecord
from blip3o_fast.training.tracking import MetricsFile, numbers, open_trackers
from blip3o_fast.training.validation import Validator

OnStep = Callable[[StepRecord], None]


class TrainingInterrupted(Exception):
    """Training stopped on a signal, after saving.

    Attributes:
        signal_number: which one.
        checkpoint: where training will continue; None before the first step.
    """

    def __init__(self, signal_number: int, checkpoint: Path | None) -> None:
        saved = "before the first step" if checkpoint is None else f"saved {checkpoint}"
        super().__init__(f"stopped by {signal.Signals(signal_number).name}, {saved}")
        self.signal_number = signal_number
        self.checkpoint = checkpoint

    @property
    def exit_status(self) -> int:
        """130 for SIGINT, as shells expect; 143 for the others."""
        return 130 if self.signal_number == signal.SIGINT else STOPPED


class Trainer:
    """A run in progress: built from a plan, continued from its folder, then ``run``.

    Args:
        plan: what to do.
        world: the processes that do it together.
        on_step: called on the main process with every step's record, in order.
    """

    def __init__(self, plan: TrainingPlan, world: World, on_step: OnStep | None = None) -> None:
        options = plan.options
        self.plan, self.world, self.on_step = plan, world, on_step
        self.folder = Path(options.output_dir)
        self.model = build_model(plan)
        self.parallel = spread(
            self.model, world, options.parallel, plan.precision, plan.compile_mode
        )
        self.loader = Loader(
            plan.train,
            batch_size=options.batch_size,
            seed=options.seed,
            device=plan.device,
            rank=world.rank,
            world_size=world.size,
            workers=max(options.num_workers, 1),
            prefetch=options.prefetch,
        )
        self.state = TrainingState(
            model=self.model,
            optimizer=make_optimizer(plan.optimizer, self.model, options),
            scaler=plan.precision.scaler(),
            clipper=AdaptiveClipper(
                options.max_grad_norm, adaptive=options.adaptive_grad_clipping, device=plan.device
            ),
            average=WeightAverage(self.model, options.ema_decay) if options.ema_decay else None,
            loader=self.loader,
            progress=Progress(),
            world=world,
            device=plan.device,
            seed=options.seed,
            sharded=self.parallel.kind == "fsdp",
        )
        self.step = OptimizerStep(plan, world, self.parallel, self.state)
        self.recorder = Recorder(
            world,
            max_nonfinite=options.max_nonfinite_steps,
            scaled=self.state.scaler.is_enabled(),
        )
        self.validator = Validator(plan, world)

    def run(self) -> None:
        """Train to the end of the plan, from wherever the run's folder says it is.

        Raises:
            TrainingInterrupted: after saving, on SIGTERM, SIGUSR1 or SIGINT.
            NonFiniteGradients: naming the batches, if training has broken down.
            OSError: if a record or a checkpoint cannot be written.
        """
        with StopSignals(alone=self.world.size == 1) as signals, self.loader:
            self.signals = signals
            self.restore()
            self.open_records()
            try:
                self.train()
            finally:
                self.close_records()

    def restore(self) -> None:
        """Go on from the newest complete checkpoint, where there is one."""
        if self.world.is_main:
            checkpoints.delete_unfinished(self.folder)
        self.world.barrier()
        found = checkpoints.complete_checkpoints(self.folder)
        if found:
            self.state.read(found[0])
            self.mend_pointers(found[0])
        self.before = self.state.progress.step
        self.started = time.perf_counter() - self.state.progress.seconds

    def mend_pointers(self, newest: Path) -> None:
        """Repair the pointers if a crash came between a checkpoint and its pointer."""
        best = self.state.progress.best
        if self.world.is_main:
            checkpoints.point(self.folder, checkpoints.LATEST, newest)
            folder = self.folder / checkpoints.checkpoint_name(best.step) if best else None
            if folder is not None and checkpoints.is_complete(folder):
                checkpoints.point(self.folder, checkpoints.BEST, folder)

    def open_records(self) -> None:
        """Open what the main process writes and shows."""
        options, progress = self.plan.options, self.state.progress
        main = self.world.is_main
        self.metrics = (
            MetricsFile(self.folder, progress.step, validated=progress.validated) if main else None
        )
        self.trackers = open_trackers(self.folder, options, progress.step) if main else []
        self.display = ProgressDisplay(
            self.plan.total_steps,
            progress.step,
            every=options.log_every_n_steps,
            samples=options.batch_size,
            enabled=main and options.progress,
        )
        self.display.start(self.plan, self.model.get_num_parameters())

    def close_records(self) -> None:
        """Write out what is left."""
        self.display.close()
        for tracker in self.trackers:
            tracker.close()
        if self.metrics is not None:
            self.metrics.close()

    def train(self) -> None:
        """The loop over steps, with records, validations, checkpoints and signals between them."""
        options, progress = self.plan.options, self.state.progress
        every = 1 if self.plan.device.type == "cpu" else options.log_every_n_steps
        self.recorder.restart_clock()
        while True:
            last = progress.step == self.plan.total_steps
            if progress.step % options.eval_every_n_steps == 0 or last:
                self.validate()
            if progress.step and (progress.step % options.save_every_n_steps == 0 or last):
                self.save()
            if last:
                return
            self.stop_if_asked()
            batch = next(self.loader)
            epoch = progress.step // self.plan.steps_per_epoch
            step_numbers = self.step(batch, progress.step)
            progress.step += 1
            progress.validated = False
            self.recorder.pending.append(
                Pending(
                    progress.step,
                    epoch,
                    self.plan.schedule.rate(progress.step - 1),
                    self.loader.wait_seconds,
                    step_numbers,
                    batch.records,
                )
            )
            due = progress.step % options.eval_every_n_steps == 0
            if progress.step % every == 0 or due or progress.step == self.plan.total_steps:
                self.flush()

    def flush(self) -> None:
        """Bring the steps since the last flush to the host, and report them."""
        for record in self.recorder.flush():
            self.display.step(record)
            if self.metrics is not None:
                self.metrics.step(record)
            for tracker in self.trackers:
                tracker.log(record.step, "train", numbers(record.to_dict()))
            if self.on_step is not None and self.world.is_main:
                self.on_step(record)

    def validate(self) -> None:
        """Validate the weights that would be used, and keep the best of them."""
        progress = self.state.progress
        if progress.validated or progress.step == 0:
            progress.validated = True
            return
        with self.usable_weights():
            result = self.validator.run(self.model, progress.step, self.asked_to_stop)
        if result is None:
            return
        progress.validated = True
        metric = self.plan.options.best_metric
        value = getattr(result, metric)
        best = math.isfinite(value) and (
            progress.best is None or value > getattr(progress.best, metric)
        )
        if best:
            progress.best = result
        self.display.validation(result, best=best)
        if self.metrics is not None:
            self.metrics.validation(result)
            self.metrics.flush()
        for tracker in self.trackers:
            tracker.log(result.step, "eval", numbers(result.to_dict()))
        if best:
            self.save(best=True)
        self.recorder.restart_clock()

    def usable_weights(self) -> AbstractContextManager[None]:
        """Inside the block the model has the averaged weights, if the run keeps any."""
        return nullcontext() if self.state.average is None else self.state.average.applied()

    def save(self, *, best: bool = False) -> Path:
        """Write a checkpoint and point to it; delete what it supersedes."""
        self.flush()
        if self.metrics is not None:
            self.metrics.flush()
        progress = self.state.progress
        progress.seconds = time.perf_counter() - self.started
        with self.signals.unhurried():
            folder = checkpoints.write_checkpoint(
                self.folder, progress.step, self.state.write, self.world
            )
        if self.world.is_main:
            checkpoints.point(self.folder, checkpoints.LATEST, folder)
            if best:
                checkpoints.point(self.folder, checkpoints.BEST, folder)
            pointers = (checkpoints.LATEST, checkpoints.BEST)
            kept = [checkpoints.pointed(self.folder, pointer) for pointer in pointers]
            checkpoints.delete_superseded(self.folder, self.plan.options.keep_last, kept)
        self.world.barrier()
        self.recorder.restart_clock()
        return folder

    def asked_to_stop(self) -> bool:
        """Whether any process has received a signal."""
        return self.world.agree(self.signals.asked())

    def stop_if_asked(self) -> None:
        """Save and stop at this step boundary, if a signal came."""
        if self.asked_to_stop():
            received = self.signals.received or signal.SIGTERM
            raise TrainingInterrupted(received, self.save() if self.state.progress.step else None)


def build_model(plan: TrainingPlan) -> BLIP3oDiT:
    """The plan's model in fp32 on its device, in training mode.

    Initial weights depend on the seed alone: they are drawn on the CPU, the same in every process.
    """
    seed_everything(plan.options.seed)
    with torch.device("cpu"):
        model = BLIP3oDiT(plan.config)
    # The published layout has learned positions even where rotary ones replace them. Processes that
    # average gradients would wait for theirs.
    model.pos_embed.requires_grad_(not plan.config.use_3d_rope)
    if plan.initial is not None:
        check_tensors(plan.config, model.state_dict(), plan.initial.tensors)
        model.load_state_dict(plan.initial.tensors)
    return model.to(device=plan.device, dtype=torch.float32).train()
