"""What a person sees while training: a bar on a terminal, plain lines anywhere else."""

from blip3o_fast.progress import Progress
from blip3o_fast.quantities import count
from blip3o_fast.training.run_plan import TrainingPlan
from blip3o_fast.training.step_records import StepRecord
from blip3o_fast.training.validation import Validation

USUAL = (0.5, 2.0)
"""Standard deviations of scaled targets that need no remark."""


class ProgressDisplay:
    """Shows steps and validations on standard error.

    Args:
        total: steps of the run.
        done: steps taken before.
        every: steps between plain lines.
        samples: of a step, for the rate.
        enabled: off shows nothing.
    """

    def __init__(self, total: int, done: int, *, every: int, samples: int, enabled: bool) -> None:
        self.total, self.every, self.samples = total, every, samples
        self.similarity: float | None = None
        self.progress = Progress("training", total, "step", done=done, enabled=enabled, lines=False)
        self.say = self.progress.say

    def start(self, plan: TrainingPlan, parameters: int) -> None:
        """Show what is going to be trained, and from where."""
        options, done = plan.options, self.progress.done
        if done == self.total:
            return
        if done:
            self.say(f"{options.output_dir}: going on after step {done}")
        self.say(
            f"training {parameters:,} parameters on {plan.device} in {plan.precision.name}: "
            f"{count(self.total, 'step')} of {count(options.batch_size, 'sample')}; "
            f"{count(len(plan.train), 'sample')} of {count(plan.train.photos, 'photo')}, "
            f"held out {count(len(plan.heldout), 'sample')} of "
            f"{count(plan.heldout.photos, 'photo')}"
        )
        if not USUAL[0] <= plan.target_deviation <= USUAL[1]:
            self.say(
                f"the targets' standard deviation is {plan.target_deviation:.3g}, and that of the "
                "noise is 1; simple_scale_factor=auto would make both 1, as the defaults expect"
            )

    def step(self, record: StepRecord) -> None:
        """Show a step."""
        if (bar := self.progress.bar) is not None:
            bar.set_postfix(self._values(record), refresh=False)
        elif record.step % self.every == 0 or record.step in (1, self.total):
            values = " ".join(f"{name} {value}" for name, value in self._values(record).items())
            self.say(f"step {record.step}/{self.total}: {values}")
        self.progress.update()

    def validation(self, result: Validation, *, best: bool) -> None:
        """Show a validation."""
        self.similarity = result.token_cosine
        self.say(
            f"validation after step {result.step}: token cosine {result.token_cosine:.4f}, "
            f"image cosine {result.image_cosine:.4f}, loss {result.loss:.4f} on {result.samples} "
            f"held-out samples in {result.seconds:.1f} s{' (best)' if best else ''}"
        )

    def close(self) -> None:
        """Leave the bar as it stands."""
        self.progress.close()

    def _values(self, record: StepRecord) -> dict[str, str]:
        values = {
            "loss": _number(record.loss),
            "similarity": _number(self.similarity),
            "norm": _number(record.grad_norm),
            "samples/s": f"{self.samples / max(record.seconds, 1e-9):.3g}",
            "wait": f"{1000 * record.data_wait:.0f}ms",
        }
        return {name: value for name, value in values.items() if value}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
