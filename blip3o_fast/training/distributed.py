"""Several processes as one run: who takes part, what they agree on, how the model is spread.

Each process holds its share of every global batch and averages gradients with the others: ``ddp``
replicates the parameters (``DistributedDataParallel``), ``fsdp`` shards parameters, gradients,
optimizer state and weight averages (FSDP2, ``fully_shard``). Start with torchrun.
"""

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from blip3o_fast.errors import OptionError
from blip3o_fast.pretrained import BLIP3oDiT
from blip3o_fast.training.precision import Precision

ParallelKind = Literal["single", "ddp", "fsdp"]


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


@contextmanager
def join_world(parallel: str, device: torch.device) -> Iterator[World]:
    """Join the process group that torchrun or the caller prepared; alone without one.

    Raises:
        OptionError: if ``parallel`` asks for a group and there is none.
    """
    prepared = dist.is_initialized()
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if not prepared and not launched:
        if parallel != "auto":
            raise OptionError(f"parallel: {parallel} expects torchrun, got a single process")
        yield World()
        return
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device.type == "cuda":
        torch.cuda.set_device(local_rank)
    if not prepared:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        control = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))
        yield World(dist.get_rank(), dist.get_world_size(), local_rank, control)
    finally:
        if not prepared:
            dist.destroy_process_group()


@dataclass(frozen=True)
class Parallel:
    """The model as training calls it.

    Attributes:
        kind: how it is spread.
        forward: ``(hidden_states, timestep, encoder_hidden_states, return_dict)``.
        synchronised: context of one micro-batch; its argument says whether gradients are averaged.
    """

    kind: ParallelKind
    forward: Callable[..., Any]
    synchronised: Callable[[bool], AbstractContextManager[Any]]


def spread(
    model: BLIP3oDiT, world: World, parallel: str, precision: Precision, compile_mode: str | None
) -> Parallel:
    """Spread ``model`` over the processes, in place for FSDP.

    Args:
        compile_mode: of ``torch.compile``; None runs eagerly.
    """
    if world.control is not None and parallel == "fsdp":
        shard(model, world, precision)

        def averaged(last: bool) -> AbstractContextManager[Any]:
            cast(Any, model).set_requires_gradient_sync(last)
            return nullcontext()

        return Parallel("fsdp", model, averaged)
    forward: nn.Module = model
    if compile_mode is not None:
        forward = cast(nn.Module, torch.compile(model, mode=compile_mode))
    if world.control is None:
        return Parallel("single", forward, lambda _: nullcontext())
    device = model.device
    # The buffers are constants. torch 2.13 gave the option that leaves them alone a new name.
    known = inspect.signature(DistributedDataParallel).parameters
    unsynced = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    replicas = DistributedDataParallel(
        forward,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **cast(Any, {unsynced: False}),
    )
    return Parallel("ddp", replicas, lambda last: nullcontext() if last else replicas.no_sync())


def shard(model: BLIP3oDiT, world: World, precision: Precision) -> None:
    """Shard ``model`` over all processes in groups: the adapter, each block, and the rest."""
    mixed = precision.name != "fp32"
    policy = MixedPrecisionPolicy(
        param_dtype=precision.dtype if mixed else None,
        reduce_dtype=torch.float32 if mixed else None,
        cast_forward_inputs=False,  # autocast decides; times must stay fp32
    )
    mesh = init_device_mesh(model.device.type, (world.size,))

    for module in (model.eva_adapter, *model.layers(), model):
        # Resharding the root too means that no copy can be stale after an update or an exchange.
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
