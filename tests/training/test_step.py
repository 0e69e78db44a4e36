"""One optimizer step: its gradients, however it is cut and run, and no wait for the device."""

import traceback
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from blip3o_fast import ops
from blip3o_fast.flow import interpolate
from blip3o_fast.ops import Impl
from blip3o_fast.processes import World
from blip3o_fast.training.run_plan import make_plan
from blip3o_fast.training.step import OptimizerStep
from blip3o_fast.training.trainer import Trainer

HOST_READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)


def trainer(options, **changes):
    return Trainer(make_plan(options(eva_adapter_dropout=0.0, **changes), World()), World())


def gradients(options, **changes):
    mine = trainer(options, **changes)
    with mine.loader:
        terms = mine.step.gradients(next(mine.loader), mine.step.draw(0))
    return terms, {n: p.grad for n, p in mine.model.named_parameters() if p.grad is not None}


def test_gradients_are_those_of_the_plain_loss(options):
    """Assembled by hand from the model, the path and the loss; nothing of the step is reused."""
    mine = trainer(options, condition_dropout=0.5, simple_scale_factor=2.0)
    with mine.loader:
        batch = next(mine.loader)
    draws = mine.step.draw(0)
    mine.step.gradients(batch, draws)
    got = {n: p.grad.clone() for n, p in mine.model.named_parameters() if p.grad is not None}
    assert 0 < int(draws.keep.sum()) < len(draws.keep), "some conditions are kept, some dropped"

    mine.model.zero_grad()
    x_1 = 2.0 * batch.clip
    x_t = interpolate(x_1, draws.noise, draws.t)
    eva = batch.eva * draws.keep[:, None, None]
    velocity = mine.model(x_t, draws.t, eva, return_dict=False)
    mine.plan.loss(velocity, x_t, x_1, draws.noise, draws.t).total.backward()
    for name, gradient in got.items():
        expected = mine.model.get_parameter(name).grad
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("pieces", [2, 3, 4])
def test_micro_batches_add_up_to_the_batch(options, pieces):
    terms, whole = gradients(options)
    cut_terms, cut = gradients(options, gradient_accumulation_steps=pieces)
    torch.testing.assert_close(terms, cut_terms, rtol=1e-5, atol=1e-6)
    assert whole.keys() == cut.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(gradient, cut[name], rtol=1e-4, atol=1e-6)


def test_checkpointing_changes_no_bit(options):
    _, plain = gradients(options)
    _, recomputed = gradients(options, gradient_checkpointing=True)
    assert plain.keys() == recomputed.keys()
    assert all(torch.equal(gradient, recomputed[name]) for name, gradient in plain.items())


def test_every_trained_parameter_gets_a_gradient(options):
    mine = trainer(options, conventions="published", condition_dropout=0.5)
    with mine.loader:
        mine.step(next(mine.loader), 0)
    missing = {n for n, p in mine.model.named_parameters() if p.requires_grad and p.grad is None}
    assert missing == set(), "processes that average gradients would wait for these"
    assert not mine.model.pos_embed.requires_grad


class HostReads(TorchDispatchMode):
    """Remembers where in the library a value was fetched from the device."""

    def __init__(self):
        super().__init__()
        self.places = []

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        if function in HOST_READS:
            frames = [f"{Path(f.filename).name}:{f.name}" for f in traceback.extract_stack()]
            self.places.append(frames)
        return function(*args, **(kwargs or {}))


def library_reads(places):
    """Reads outside torch's own optimizer, which on CUDA, fused, makes none."""
    return [frames for frames in places if not any("adam" in frame for frame in frames)]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_fused_step_never_waits_for_the_device(options, precision):
    mine = trainer(
        options,
        optimizer="fused",
        precision=precision,
        ema_decay=0.9,
        condition_dropout=0.2,
        gradient_accumulation_steps=2,
    )
    with mine.loader:
        batches = [next(mine.loader) for _ in range(3)]
    mine.step(batches[0], 0)
    with HostReads() as reads:
        for i in (1, 2):
            mine.step(batches[i], i)
    assert [frames[-4:] for frames in library_reads(reads.places)] == []


def test_such_reads_would_be_noticed(options):
    mine = trainer(options, optimizer="foreach")
    with mine.loader:
        batch = next(mine.loader)
    with HostReads() as reads:
        mine.step(batch, 0)
    assert any("apply_gradients" in frame for frames in reads.places for frame in frames)


@pytest.mark.parametrize("impl", [None, Impl.REFERENCE, Impl.TRITON])
def test_the_loss_follows_the_models_table(options, monkeypatch, impl):
    mine, used, whole = trainer(options), [], ops.flow_loss

    def flow_loss(*tensors, impl, **choices):
        used.append(impl)
        return whole(*tensors, impl=impl, **choices)

    monkeypatch.setattr(ops, "flow_loss", flow_loss)
    mine.model.set_impl(flow_loss=impl)
    step = OptimizerStep(mine.plan, World(), mine.parallel, mine.state)
    with mine.loader:
        step.gradients(next(mine.loader), step.draw(0))
    assert used == [impl]


def test_compiling_happens_once_and_changes_rounding_only(options, tmp_path, monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, mode: compile_(model, backend=backend))
    torch._dynamo.reset()
    plain, fast = trainer(options), trainer(options, compile=True, output_dir=tmp_path / "b")
    with plain.loader, fast.loader:
        for i in range(4):
            a, b = (mine.step(next(mine.loader), i) for mine in (plain, fast))
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
            if i == 0:
                first = len(graphs)
            if i == 1:
                fast.validator.run(fast.model, 1)
    assert first >= 1 and len(graphs) == first
