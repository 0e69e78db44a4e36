"""A training step and a loader, ready to be timed."""

import gc
import tempfile

import pytest
import torch

from blip3o_fast.benchmarking import training_cases as module
from blip3o_fast.benchmarking.shapes import Shape
from blip3o_fast.benchmarking.training_cases import (
    DISTINCT,
    RandomShards,
    loader_cases,
    training_cases,
    write_shards,
)
from blip3o_fast.data import EmbeddingDataset
from blip3o_fast.ops import Impl

CPU = torch.device("cpu")
SHAPE = Shape("tiny", 2, 16)


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Where temporary folders go."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_step_computes_numbers_and_leaves_nothing_behind(temporary, narrow):
    (case,) = training_cases(SHAPE, "fp32", CPU, compiled=False)
    assert case.task.samples == 2
    prepared = case.contenders[0].prepare()
    assert not prepared.kernel and prepared.close is None
    (call,) = prepared.calls
    first, second = call(), call()
    assert first.isfinite().all() and not torch.equal(first, second)
    assert list(temporary.glob("blip3o-fast-bench-*")) == []


def test_a_step_by_plain_pytorch(temporary, narrow, monkeypatch):
    """Every op of the network and of the loss, and the same numbers."""
    ran = []
    call = module.OptimizerStep.__call__

    def watched(self, batch, step):
        ran.append((self.loss.impl, {*vars(self.state.model.impls).values()}))
        return call(self, batch, step)

    monkeypatch.setattr(module.OptimizerStep, "__call__", watched)
    results = []
    for impl in (None, Impl.REFERENCE):
        torch.manual_seed(0)  # of the shards
        prepared = module.prepare_step(module.Training(SHAPE, "fp32", CPU), impl)
        results.append(prepared.calls[0]())
    assert ran == [(None, {None}), (Impl.REFERENCE, {Impl.REFERENCE})]
    torch.testing.assert_close(*results)


def test_contenders_take_turns_at_one_trainer(temporary, narrow, monkeypatch):
    """Each with its own ops, in whatever order they are called; data and weights are made once."""
    made, written, ran = [], [], []
    trainer, write, call = module.Trainer, module.write_shards, module.OptimizerStep.__call__
    monkeypatch.setattr(module, "Trainer", lambda *args: made.append(trainer(*args)) or made[-1])
    monkeypatch.setattr(
        module,
        "write_shards",
        lambda *args, **options: written.append(args) or write(*args, **options),
    )

    def watched(self, batch, step):
        impls = self.state.model.impls
        ran.append((self.loss.impl, impls.swiglu, impls.rope))
        return call(self, batch, step)

    monkeypatch.setattr(module.OptimizerStep, "__call__", watched)
    training = module.Training(SHAPE, "fp32", CPU)
    first = module.prepare_step(training)
    second = module.prepare_step(training, Impl.REFERENCE, rope=None)
    for prepared in (first, second, first):
        assert prepared.calls[0]().isfinite().all()
    own, other = (None, None, None), (Impl.REFERENCE, Impl.REFERENCE, None)
    assert ran == [own, other, own]
    assert len(made) == len(written) == 1
    assert made[0].loader.total_wait_seconds >= 0


def test_contenders_on_a_gpu(monkeypatch):
    monkeypatch.setattr(module, "has_impl", lambda impl, op, *_, gradients: op != "rope")
    (case,) = training_cases(SHAPE, "bf16", torch.device("cuda"), compiled=True)
    assert {contender.name: contender.ours for contender in case.contenders} == {
        "trainer": True,
        "trainer, torch.compile": True,
        "trainer, CUDA C++": True,
        "reference": False,
        "reference, torch.compile": False,
    }


def test_a_loader_reads_many_more_batches_than_it_keeps_ready(temporary):
    cases = list(loader_cases(SHAPE, CPU))
    assert [case.contenders[0].name for case in cases] == ["1 thread", "2 threads"]
    for case in cases:
        # Two samples of 16 tokens, 4096 + 1024 columns of two bytes.
        assert case.task.work == (0.0, 0.0, 2 * 16 * 5120 * 2)
        prepared = case.contenders[0].prepare()
        assert prepared.per_call >= 16
        prepared.calls[0]()
        prepared.close()
        assert len(list(temporary.glob("blip3o-fast-bench-*"))) == 1, "written once, for all"
    del cases, case, prepared
    gc.collect()
    assert list(temporary.glob("blip3o-fast-bench-*")) == []


def test_each_loader_is_timed_by_itself():
    assert all(len(case.contenders) == 1 for case in loader_cases(SHAPE, CPU))


@pytest.mark.parametrize("batch", [2, 128])
def test_the_shards_of_a_step_hold_one_batch_to_learn_from(temporary, batch):
    small = SHAPE.config.replace(eva_embedding_size=8, clip_embedding_size=8)
    shards = RandomShards(small, batch)
    dataset = EmbeddingDataset(shards.folder(), split="train")
    assert len(dataset) == batch
    assert len(EmbeddingDataset(shards.folder(), split="heldout")) == 1
    towers = dataset.read(list(range(batch)))
    assert len({row.double().sum().item() for row in towers.eva}) == min(batch, DISTINCT)


def test_shards_without_repetition(tmp_path):
    small = SHAPE.config.replace(eva_embedding_size=8, clip_embedding_size=8)
    write_shards(tmp_path, small, 20, held_out=3)
    dataset = EmbeddingDataset(tmp_path, split="train")
    towers = dataset.read(list(range(17)))
    assert len(dataset) == 17
    assert len({row.double().sum().item() for row in towers.eva}) == 17
