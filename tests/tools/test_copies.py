"""Copies, files, casts and weights that somebody writes behind the model's back."""

import copy
import io
import pickle

import pytest
import torch

from blip3o_fast import SamplingPlan, forget
from blip3o_fast.ops import Impl
from tests.tools.models import build, inputs, velocity


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved_and_loaded]
)


@COPIES
def test_a_copy_has_weights_of_its_own(copied):
    model, (x, _, eva) = build(), inputs()
    sample, expected = model.generate(eva, 2, noise=x), velocity(model)
    other = copied(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(velocity(other), expected)
    assert torch.equal(other.generate(eva, 2, noise=x), sample)
    assert not model.generate(eva, 2, noise=x).equal(sample)


@COPIES
@pytest.mark.parametrize("op", ["sandwich_join", "rope", "swiglu"])
def test_a_copy_has_implementations_of_its_own(copied, op):
    """Every part of the copy sees what is chosen for it, no part of the original does."""
    model, (x, _, eva) = build(), inputs()
    other = copied(model)
    other.set_impl(**{op: Impl.CUDA})  # refused on a CPU wherever it is asked for
    for call in (velocity, lambda model: model.generate(eva, 1, noise=x)):
        with pytest.raises(ValueError, match="impl=CUDA"):
            call(other)
        assert call(model).isfinite().all()


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float64, 1e-4), (torch.bfloat16, 0.02), (torch.float16, 0.004)]
)
def test_casts(dtype, limit):
    model, (x, t, eva) = build(), inputs()
    cast = copy.deepcopy(model).to(dtype)
    assert cast.rotary.cos.dtype == torch.float32
    got = cast(x.to(dtype), t, eva.to(dtype), return_dict=False)
    assert got.dtype == dtype
    expected = velocity(model)
    assert (got.float() - expected).norm() < limit * expected.norm()


def test_through_the_meta_device():
    model = build()
    empty = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    assert torch.equal(velocity(empty), velocity(model))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_weights_written_behind_the_models_back(dtype):
    """``.data`` raises no version counter; ``forget`` is what its docstring promises."""
    model, (x, _, eva) = build(), inputs()
    plan = SamplingPlan(model, steps=2, dtype=dtype)
    before = plan(eva, x)
    model.output_proj.weight.data[0, 0] += 100
    forget(model)
    after = plan(eva, x)
    assert not torch.equal(after, before)
    assert torch.equal(after, SamplingPlan(copy.deepcopy(model), steps=2, dtype=dtype)(eva, x))
