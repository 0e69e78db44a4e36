"""Opt-in measurement of launch parameters, kept on disk.

``enable()`` makes every row kernel time its candidates the first time that it meets a new
(kernel, device, dtype, width, power of two of rows). The winners go to a JSON file, so that a later
process measures nothing. Off, the table of ``blip3o_kernels.launch`` is used.

The number of warps decides the order in which a row is summed, and a measured one may differ
between row counts: with tuning on, a sample's last bits may depend on how many samples come with
it. They are still equal from run to run once a file exists. Nothing is measured while a CUDA graph
is captured.
"""

import json
import os
import statistics
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

WARM_UPS = 3
LAUNCHES = 20
REPEATS = 5

Launch = TypeVar("Launch", bound=tuple[int, ...])


class _Table(NamedTuple):
    path: Path
    choices: dict[str, list[int]]


_table: _Table | None = None
_lock = threading.Lock()


def default_path() -> Path:
    """``blip3o_fast/launches.json`` in the user's cache folder (``XDG_CACHE_HOME``)."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "blip3o_fast" / "launches.json"


def enable(path: Path | str | None = None) -> None:
    """Use the measured launches in ``path``, and measure and add the ones that it lacks.

    Raises:
        ValueError: if the file is not one that this module wrote.
    """
    global _table
    file = default_path() if path is None else Path(path)
    table = _Table(file, _read(file) if file.exists() else {})
    with _lock:
        _table = table


def disable() -> None:
    """Return to the built-in table."""
    global _table
    with _lock:
        _table = None


def enabled() -> bool:
    """Whether launches are measured."""
    return _table is not None


def best(
    name: str,
    x: Tensor,
    rows: int,
    candidates: Sequence[Launch],
    run: Callable[[Launch], object],
    time: Callable[[Callable[[], object]], float] | None = None,
) -> Launch:
    """The fastest of ``candidates`` for kernel ``name`` on ``rows`` rows like those of ``x``.

    ``run`` launches the kernel and may be called any number of times. The first candidate is the
    built-in one, which is also the answer where nothing may be measured. ``time`` is the clock, in
    milliseconds a call; None is the device's.
    """
    table = _table
    if table is None:
        return candidates[0]
    key = f"{name} {_device_name(x)} {x.dtype} {x.shape[-1]} {max(rows - 1, 0).bit_length()}"
    with _lock:
        for candidate in candidates:
            if list(candidate) == table.choices.get(key):
                return candidate
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return candidates[0]
        times = [(time or _device_time)(lambda c=c: run(c)) for c in candidates]
        winner = candidates[times.index(min(times))]
        table.choices[key] = list(winner)
        _write(table)
    return winner


def _device_name(x: Tensor) -> str:
    return torch.cuda.get_device_name(x.device) if x.is_cuda else x.device.type


def _device_time(launch: Callable[[], object]) -> float:
    """Median milliseconds a launch, by device events around batches of launches."""
    for _ in range(WARM_UPS):
        launch()
    samples: list[float] = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(LAUNCHES):
            launch()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) / LAUNCHES)
    return statistics.median(samples)


def _read(path: Path) -> dict[str, list[int]]:
    try:
        choices = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected a JSON table of launches, got {error}") from error
    fits = isinstance(choices, dict) and all(
        isinstance(value, list) and all(isinstance(n, int) for n in value)
        for value in choices.values()
    )
    if not fits:
        raise ValueError(
            f"{path}: expected a JSON table of launches; remove the file to start over"
        )
    return choices


def _write(table: _Table) -> None:
    """Replace the file in one step, so that a reader never sees half of it."""
    table.path.parent.mkdir(parents=True, exist_ok=True)
    draft = table.path.with_name(f"{table.path.name}.{os.getpid()}")
    draft.write_text(json.dumps(table.choices, indent=1, sort_keys=True))
    draft.replace(table.path)
