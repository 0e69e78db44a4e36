"""How a model is spread over the processes of a run.

Each process holds its share of every global batch and averages gradients with the others: ``ddp``
replicates the parameters (``DistributedDataParallel``), ``fsdp`` shards parameters, gradients,
optimizer state and weight averages (FSDP2, ``fully_shard``). Start with torchrun.
"""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from blip3o_fast.pretrained import BLIP3oDiT
from blip3o_fast.processes import World
from blip3o_fast.training.precision import Precision

ParallelKind = Literal["single", "ddp", "fsdp"]


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
    # The buffers are constants. torch 2.13 renamed the option that leaves them alone.
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
        # The root is resharded too, so that no gathered copy is stale after an update or exchange.
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
