"""Several processes as one run: who takes part, and what they agree on."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from blip3o_fast.errors import OptionError

PATIENCE = timedelta(minutes=10)
"""For processes that work in step."""


@dataclass(frozen=True)
class World:
    """The processes of a run, and this one among them.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
        local_rank: of this process on its machine; the index of its GPU.
        control: a gloo group for host-side agreement; None for a process that is alone.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    control: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes the files."""
        return self.rank == 0

    def agree(self, flag: bool) -> bool:
        """Whether any process raised the flag; all of them must ask together."""
        return -self.minimum(-int(flag)) > 0

    def minimum(self, value: int) -> int:
        """The least value among the processes."""
        if self.control is None:
            return value
        x = torch.tensor(value, device="cpu")
        dist.all_reduce(x, dist.ReduceOp.MIN, group=self.control)
        return int(x)

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, in order of rank, on every process."""
        if self.control is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def sum(self, x: Tensor) -> Tensor:
        """Sum over processes of a small tensor, in place, wherever it lives."""
        if self.control is not None:
            on_host = x.cpu()
            dist.all_reduce(on_host, group=self.control)
            x.copy_(on_host)
        return x

    def barrier(self) -> None:
        """Wait for the others."""
        if self.control is not None:
            dist.barrier(group=self.control)


class Place(NamedTuple):
    """The place of this process among those that were started together."""

    rank: int
    size: int
    local_rank: int


def find_place() -> Place | None:
    """What torchrun says in the environment; None for a process that was started alone.

    Raises:
        OptionError: naming the variable that holds no number.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    numbers = []
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        text = os.environ.get(name, "0")
        if not (text.isascii() and text.isdecimal()):
            raise OptionError(f"{name}: expected a number in the environment, got {text!r}")
        numbers.append(int(text))
    return Place(*numbers)


@contextmanager
def join_world(
    parallel: str, device: torch.device, patience: timedelta = PATIENCE
) -> Iterator[World]:
    """Join the process group that torchrun or the caller prepared; alone without one.

    Args:
        parallel: ``auto``, or a kind that needs several processes.
        device: of this process.
        patience: how long a process waits for the others before it fails.

    Raises:
        OptionError: if ``parallel`` asks for a group and there is none.
    """
    prepared = dist.is_initialized()
    place = find_place()
    if not prepared and place is None:
        if parallel != "auto":
            raise OptionError(f"parallel: {parallel} expects torchrun, got a single process")
        yield World()
        return
    local_rank = 0 if place is None else place.local_rank
    if device.type == "cuda":
        torch.cuda.set_device(local_rank)
    if not prepared:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    try:
        control = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=patience))
        yield World(dist.get_rank(), dist.get_world_size(), local_rank, control)
    finally:
        if not prepared:
            dist.destroy_process_group()
