"""The published implementation: a checkout that is one, and one that is not."""

import pytest
import torch

from blip3o_fast.benchmarking.checkout import (
    MODEL_FILE,
    check_checkout,
    describe_checkout,
    load_published,
    open_checkout,
)
from blip3o_fast.benchmarking.network_cases import Network
from blip3o_fast.benchmarking.shapes import Shape
from blip3o_fast.errors import OptionError

SHAPE = Shape("tiny", 2)
SOURCE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel

SEEN = []

class Model(torch.nn.Module):
    def __init__(self, size):
        super().__init__()
        self.size = size
        self.first = torch.nn.Linear(1024, 8)
        self.last = torch.nn.Linear(8, 1024)
        torch.nn.init.zeros_(self.last.weight)

    def forward(self, x, times, eva, return_dict):
        assert x.dtype == torch.float32 and not return_dict
        assert not self.training and not torch.is_grad_enabled()
        SEEN.append((tuple(x.shape), tuple(times.shape), tuple(eva.shape)))
        return self.last(self.first(x))

def create_improved_clip_reproduction_model(model_size):
    return Model(model_size)
"""


@pytest.fixture
def checkout(tmp_path):
    file = tmp_path / MODEL_FILE
    file.parent.mkdir(parents=True)
    file.write_text(SOURCE)
    return tmp_path


def test_no_folder(tmp_path):
    with pytest.raises(OptionError, match=r"published: expected a folder, found none at .*nowhere"):
        check_checkout(tmp_path / "nowhere")


def test_another_repository(tmp_path):
    with pytest.raises(OptionError, match=f"with {MODEL_FILE} in it; .* has none"):
        check_checkout(tmp_path)
    with pytest.raises(OptionError):
        open_checkout(tmp_path, SHAPE)


def test_none_was_named():
    assert open_checkout(None, SHAPE) is None
    assert describe_checkout(None) == "absent: no checkout was named; --published FOLDER"


def test_a_copy_without_history(checkout, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(checkout.parent))
    assert describe_checkout(checkout) == "a copy without its history"


def test_a_commit(monkeypatch, tmp_path):
    found = "blip3o_fast.benchmarking.checkout.find_commit"
    monkeypatch.setattr(found, lambda _: ("0123456789abcdef", False))
    assert describe_checkout(tmp_path) == "commit 0123456789ab"
    monkeypatch.setattr(found, lambda _: ("0123456789abcdef", True))
    assert describe_checkout(tmp_path) == "commit 0123456789ab, changed"


def test_weights_that_begin_at_zero_are_made_random(checkout):
    model = load_published(check_checkout(checkout), SHAPE)
    assert model.size == "tiny" and not model.training
    assert float(model.last.weight.detach().std()) == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(("dtype", "returned"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_it_runs_at_the_shape_of_our_model(checkout, dtype, returned):
    make = open_checkout(checkout, SHAPE)
    model = Network(Shape("tiny", 1, 16), dtype, torch.device("cpu")).get()[0]
    assert make is not None
    result = make(model)()
    assert result.shape == (2, 256, 1024)
    assert result.dtype == returned, "fp32 weights, under autocast where ours are narrower"
