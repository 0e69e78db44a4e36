"""One transformer block."""

from collections.abc import Iterator
from typing import Any

import torch

from blip3o_fast.benchmarking import work
from blip3o_fast.benchmarking.cases import Case, Contender, Task, check_agreement
from blip3o_fast.benchmarking.ceilings import DTYPES
from blip3o_fast.benchmarking.network_cases import TIME, Network, using
from blip3o_fast.benchmarking.shapes import Shape
from blip3o_fast.benchmarking.watch import Call, Prepared
from blip3o_fast.model.network import Branch, Rotary
from blip3o_fast.ops import Impl


def block_cases(
    shape: Shape, dtype: str, device: torch.device, *, compiled: bool
) -> Iterator[Case]:
    """The forward pass of one transformer block; it computes its modulations from the time.

    The blocks of the model take turns, so that no block finds its weights in a cache.
    """
    network = Network(shape, dtype, device)
    needed = work.block(shape.config, shape.batch, DTYPES[dtype].itemsize)
    task = Task("block", "forward", shape.name, dtype, needed, shape.batch)

    def prepare(name: str, impl: Impl | None, compile_it: bool) -> Prepared:
        model, _, _ = network.get()
        calls = [block_call(network, index, impl, compile_it) for index in range(len(model.blocks))]
        check_agreement(
            f"block by {name}", calls[0](), block_call(network, 0, Impl.REFERENCE, False)()
        )
        weights = sum(x.nbytes for x in model.blocks.parameters())
        return Prepared(calls, warm=True, rotation=weights)

    def contender(
        name: str, impl: Impl | None, *, ours: bool, compile_it: bool = False
    ) -> Contender:
        return Contender(name, lambda: prepare(name, impl, compile_it), ours)

    on_cpu = device.type == "cpu"
    contenders = [contender("reference", Impl.REFERENCE, ours=on_cpu)]
    if not on_cpu:
        contenders.insert(0, contender("fused ops", None, ours=True))
    if compiled:
        contenders.append(contender("torch.compile", Impl.REFERENCE, ours=False, compile_it=True))
    yield Case(task, tuple(contenders))


def block_call(network: Network, index: int, impl: Impl | None, compile_it: bool) -> Call:
    """Block ``index`` of the model on random tokens."""
    model, _, _ = network.get()
    shape, device = network.shape, network.device
    torch.manual_seed(index)
    size = (shape.batch, shape.tokens, shape.config.hidden_size)
    stream, context = (torch.randn(size, device=device, dtype=network.dtype) for _ in range(2))
    times = torch.full((shape.batch,), TIME, device=device)
    with torch.no_grad():
        activated = torch.nn.functional.silu(model.timestep_embedder(times))
    block: Any = model.layers()[index]
    if compile_it:
        mode = "max-autotune-no-cudagraphs" if device.type == "cuda" else "default"
        block = torch.compile(block, mode=mode, dynamic=False)
    rotary = Rotary(model.rotary.cos, model.rotary.sin)
    arguments = (stream, Branch(stream), context, activated, rotary)

    def call() -> object:
        with using(model, impl):
            return block(*arguments, stays=True)

    return call
