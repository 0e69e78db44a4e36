"""What a person sees while training: a bar on a terminal, plain lines anywhere else."""

from blip3o_fast.progress import Progress
from blip3o_fast.training.step_records import StepRecord
from blip3o_fast.training.validation import Validation


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

    def step(self, record: StepRecord) -> None:
        """Show a step."""
        values = self._values(record)
        if (bar := self.progress.bar) is not None:
            bar.set_postfix(values, refresh=False)
        elif record.step % self.every == 0 or record.step in (1, self.total):
            shown = " ".join(f"{name} {value}" for name, value in values.items())
            self.say(f"step {record.step}/{self.total}: {shown}")
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
            "samples/s": f"{self.samples / max(record.seconds, 1e-9):.0f}",
            "wait": f"{1000 * record.data_wait:.0f}ms",
        }
        return {name: value for name, value in values.items() if value}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
