"""Small runs, and the comparison of finished ones, bit by bit."""

import torch
from safetensors.torch import load_file

from blip3o_fast.training import TrainingOptions, checkpoints
from blip3o_fast.training.tracking import read_metrics

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "eva_adapter_layers": 1,
    "batch_size": 4,
    "max_steps": 6,
    "learning_rate": 1e-2,
    "eval_every_n_steps": 3,
    "eval_num_samples": 4,
    "eval_inference_steps": 1,
    "save_every_n_steps": 2,
    "progress": False,
    "device": "cpu",
}
"""Six tokens, width 16, one block."""

TIMES = ("seconds", "data_wait")
"""What two equal runs may differ in."""


def small_options(**changes):
    return TrainingOptions(**{**SMALL, **changes})


def assert_equal_runs(one, other):
    """Final weights, everything that a resume would need, pointers and records are equal."""
    newest = [checkpoints.complete_checkpoints(run)[0] for run in (one, other)]
    assert newest[0].name == newest[1].name
    weights = [load_file(folder / "model.safetensors") for folder in newest]
    assert_same(*weights, "weights")
    states = [torch.load(folder / "trainer.pt", weights_only=True) for folder in newest]
    assert_same(*states, "state")
    for name in (checkpoints.LATEST, checkpoints.BEST):
        assert (one / name).read_text() == (other / name).read_text()
        assert checkpoints.pointed(one, name) is not None
    records = [[untimed(record) for record in read_metrics(run)] for run in (one, other)]
    assert records[0] == records[1]
    assert [path.name for path in one.glob(".*")] == [] == [path.name for path in other.glob(".*")]


def assert_same(a, b, where):
    """Two trees of containers are equal; tensors bit by bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - set(TIMES):
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def untimed(record):
    return {name: value for name, value in record.items() if name not in TIMES}
