"""Stopping on request without losing a step.

The first SIGTERM, SIGUSR1 (schedulers' warning of preemption) or SIGINT is remembered; the trainer
asks at every step boundary, saves and stops. A second one acts at once, as it would without us.
"""

import os
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

EXIT_STATUS = 143
"""Of a run that was stopped by SIGTERM or SIGUSR1 and has saved."""


class TrainingInterrupted(Exception):
    """Training stopped on a signal, after saving.

    Attributes:
        signal_number: which one.
        checkpoint: where training will go on from; None before the first step.
    """

    def __init__(self, signal_number: int, checkpoint: Path | None) -> None:
        saved = "before the first step" if checkpoint is None else f"saved {checkpoint}"
        super().__init__(f"stopped by {signal.Signals(signal_number).name}, {saved}")
        self.signal_number = signal_number
        self.checkpoint = checkpoint

    @property
    def exit_status(self) -> int:
        """130 for SIGINT, as shells expect; 143 for the others."""
        return 130 if self.signal_number == signal.SIGINT else EXIT_STATUS


class StopSignals:
    """Listens inside a ``with`` block; outside the main thread, where Python forbids it, it cannot.

    Attributes:
        received: number of the first signal, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
                if hasattr(signal, name):  # Windows has no SIGUSR1
                    number = getattr(signal, name)
                    self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.received is None:
            self.received = number
            return
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
