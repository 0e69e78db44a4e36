"""Two gloo processes train a model that FSDP2 has sharded: ``python -m tests.tools.sharded FILE``.

The first of them leaves in FILE, for every way to shard, a sample and the weights. This process
imports torch once and forks.
"""

import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from blip3o_fast.checkpoint import published_names
from blip3o_fast.model import DiTBlock
from tests.tools.models import build, inputs

PROCESSES = 2
BATCH = 4
LEARNING_RATE = 3e-2


def by_block(model):
    """The recipe of torch's own tutorial."""
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)


def by_block_with_recomputation(model):
    model.gradient_checkpointing_enable()
    by_block(model)


def by_block_with_torchs_recomputation(model):
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, DiTBlock))
    by_block(model)


def by_compiled_block(model):
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    by_block(model)


def by_projection(model):
    for module in model.modules():
        if isinstance(module, nn.Linear):
            fully_shard(module)
    fully_shard(model)


RECIPES = (
    by_block,
    by_block_with_recomputation,
    by_block_with_torchs_recomputation,
    by_compiled_block,
    by_projection,
)


def train(prepare, rank=0, processes=1):
    """Two steps on this process's rows; then a sample from all rows, and the whole weights."""
    model = build(eva_adapter_dropout=0.0).train()  # its draws depend on the process
    prepare(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    x, t, eva = inputs(BATCH)
    rows = slice(rank * BATCH // processes, (rank + 1) * BATCH // processes)
    for _ in range(2):
        loss = model(x[rows], t[rows], eva[rows], return_dict=False).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        velocity = model.eval()(x, t, eva, return_dict=False)
    sample = model.generate(eva, 2, noise=x)
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {"velocity": velocity, "sample": sample, **published_names(weights)}


def run_rank(rank, file):
    dist.init_process_group(
        "gloo",
        init_method=f"file://{file}.store",
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(seconds=60),
    )
    seen = {recipe.__name__: train(recipe, rank, PROCESSES) for recipe in RECIPES}
    if rank == 0:
        torch.save(seen, file)
    dist.destroy_process_group()


def start(rank, file):
    """A child that is one of the processes; returns its process id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            run_rank(rank, file)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def main(file):
    torch.set_num_threads(1)
    children = [start(rank, file) for rank in range(PROCESSES)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(max(map(abs, codes)))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
