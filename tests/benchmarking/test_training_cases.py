"""A training step and a loader, ready to be timed."""

import tempfile
from pathlib import Path

import pytest
import torch

from blip3o_fast.benchmarking import training_cases as module
from blip3o_fast.benchmarking.shapes import Shape
from blip3o_fast.benchmarking.training_cases import loader_cases, training_cases, write_shards
from blip3o_fast.data import EmbeddingDataset
from blip3o_fast.ops import Impl

CPU = torch.device("cpu")
SHAPE = Shape("tiny", 2, 16)


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Where temporary folders go."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_step_computes_numbers_and_leaves_nothing_behind(temporary, monkeypatch):
    # The adapter of the published widths alone has 40 million weights.
    narrow = SHAPE.config.replace(eva_embedding_size=64, clip_embedding_size=32)
    monkeypatch.setattr(Shape, "config", narrow)
    (case,) = training_cases(SHAPE, "fp32", CPU, compiled=False)
    assert case.task.samples == 2
    prepared = case.contenders[0].prepare()
    assert not prepared.kernel and prepared.close is not None
    (call,) = prepared.calls
    first, second = call(), call()
    assert first.isfinite().all() and not torch.equal(first, second)
    prepared.close()
    assert list(temporary.glob("blip3o-fast-bench-*")) == []


def test_a_step_by_plain_pytorch(temporary, monkeypatch):
    """Every op of the network and of the loss, and the same numbers."""
    narrow = SHAPE.config.replace(eva_embedding_size=64, clip_embedding_size=32)
    monkeypatch.setattr(Shape, "config", narrow)
    made = []
    step = module.OptimizerStep
    monkeypatch.setattr(module, "OptimizerStep", lambda *args: made.append(step(*args)) or made[-1])
    results = []
    for impl in (None, Impl.REFERENCE):
        torch.manual_seed(0)  # of the shards
        prepared = module.prepare_step(SHAPE, "fp32", CPU, impl)
        results.append(prepared.calls[0]())
        prepared.close()
    assert made[1].loss.impl is Impl.REFERENCE
    assert set(vars(made[1].state.model.impls).values()) == {Impl.REFERENCE}
    torch.testing.assert_close(*results)


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
    assert list(temporary.glob("blip3o-fast-bench-*")) == []


def test_each_loader_is_timed_by_itself():
    assert all(len(case.contenders) == 1 for case in loader_cases(SHAPE, CPU))


@pytest.mark.parametrize("batch", [2, 128])
def test_the_shards_of_a_step_hold_a_batch_to_learn_from(tmp_path, batch, monkeypatch):
    sizes = []
    monkeypatch.setattr(
        module, "write_shards", lambda *args, **options: sizes.append((args[2], options))
    )
    (case,) = training_cases(Shape("tiny", batch, 16), "fp32", CPU, compiled=False)
    with pytest.raises(Exception, match="shards"):
        case.contenders[0].prepare()
    ((samples, options),) = sizes
    narrow = SHAPE.config.replace(eva_embedding_size=8, clip_embedding_size=8)
    write_shards(Path(tmp_path), narrow, samples, **options)
    assert len(EmbeddingDataset(tmp_path, split="train")) >= batch
