"""What a person sees while training: a bar on a terminal, plain lines anywhere else."""

import sys

from tqdm import tqdm

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
        self.enabled = enabled
        self.similarity: float | None = None
        terminal = enabled and sys.stderr.isatty()
        self.bar = (
            tqdm(total=total, initial=done, desc="training", unit="step", dynamic_ncols=True)
            if terminal
            else None
        )

    def step(self, record: StepRecord) -> None:
        """Show a step."""
        if self.bar is not None:
            self.bar.set_postfix(self._values(record), refresh=False)
            self.bar.update()
        elif record.step % self.every == 0 or record.step == self.total:
            values = " ".join(f"{name} {value}" for name, value in self._values(record).items())
            self.say(f"step {record.step}/{self.total}: {values}")

    def validation(self, result: Validation, *, best: bool) -> None:
        """Show a validation."""
        self.similarity = result.token_cosine
        self.say(
            f"validation after step {result.step}: token cosine {result.token_cosine:.4f}, "
            f"image cosine {result.image_cosine:.4f}, loss {result.loss:.4f} on {result.samples} "
            f"held-out samples in {result.seconds:.1f} s{' (best)' if best else ''}"
        )

    def say(self, line: str) -> None:
        """Show a line, without breaking the bar."""
        if self.enabled:
            tqdm.write(line, file=sys.stderr)
            sys.stderr.flush()

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self.bar is not None:
            self.bar.close()

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
