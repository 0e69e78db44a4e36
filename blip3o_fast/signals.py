"""Stopping on request without losing work.

The first signal is remembered; whoever works asks at every boundary, saves and stops. A second one
acts at once, as it would without us.
"""

import os
import signal
import threading
from types import FrameType
from typing import Any, Self

STOPPED = 143
"""Exit status after SIGTERM or SIGUSR1, when what was done is saved."""


class StopSignals:
    """Listens inside a ``with`` block; outside the main thread, where Python forbids it, it cannot.

    Args:
        names: which signals. SIGUSR1 is schedulers' warning of preemption.

    Attributes:
        received: number of the first signal, or None.
    """

    def __init__(self, *names: str) -> None:
        self.names = names or ("SIGTERM", "SIGUSR1", "SIGINT")
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def asked(self) -> bool:
        """Whether a signal has come."""
        return self.received is not None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for name in self.names:
                if hasattr(signal, name):  # Windows has no SIGUSR1
                    number = getattr(signal, name)
                    self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.received is None:
            self.received = number
            return
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
