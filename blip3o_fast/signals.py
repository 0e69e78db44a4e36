"""Stopping on request without losing work.

The first signal is remembered; whoever works asks at every boundary, saves and stops. A second one
acts at once, as it would without us. One process of several may be waiting for another that no
longer answers, where Python does not even see a signal: a thread then ends it.
"""

import contextlib
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, Self

STOPPED = 143
"""Exit status after SIGTERM or SIGUSR1, when what was done is saved."""
PATIENCE = 60.0
"""Seconds without a boundary after which a signal ends one process of several."""


class StopSignals:
    """Listens inside a ``with`` block; outside the main thread, where Python forbids it, it cannot.

    Args:
        names: which signals. SIGUSR1 is schedulers' warning of preemption.
        alone: off for one process of several, which a signal ends after ``PATIENCE`` seconds
            without a boundary.

    Attributes:
        received: number of the first signal, or None.
    """

    def __init__(self, *names: str, alone: bool = True) -> None:
        self.names = names or ("SIGTERM", "SIGUSR1", "SIGINT")
        self.alone = alone
        self.received: int | None = None
        self._previous: dict[int, Any] = {}
        self._boundary = time.monotonic()

    def asked(self) -> bool:
        """Whether a signal has come; asked at every boundary."""
        self._boundary = time.monotonic()
        return self.received is not None

    @contextlib.contextmanager
    def unhurried(self) -> Iterator[None]:
        """Inside the block a process may work for longer than ``PATIENCE``, as on a checkpoint."""
        self._boundary = math.inf
        try:
            yield
        finally:
            self._boundary = time.monotonic()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for name in self.names:
                if hasattr(signal, name):  # Windows has no SIGUSR1
                    number = getattr(signal, name)
                    self._previous[number] = signal.signal(number, self._receive)
            if not self.alone:
                self._watched, told = socket.socketpair()
                told.setblocking(False)
                self._told = told
                # Written by the system's handler, before and whether or not Python's runs.
                signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
                threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._previous and not self.alone:
            signal.set_wakeup_fd(-1)
            self._told.close()

    def _watch(self) -> None:
        with self._watched as watched:
            while (heard := watched.recv(1)) and heard[0] not in self._previous:
                pass
            if not heard:
                return
            came = time.monotonic()
            watched.settimeout(0.5)
            while time.monotonic() < max(came, self._boundary) + PATIENCE:
                with contextlib.suppress(TimeoutError):
                    if not watched.recv(1):
                        return
        os.write(2, b"stopped without saving: another process of this run does not answer\n")
        os._exit(128 + heard[0])

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.received is None:
            self.received = number
            return
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
