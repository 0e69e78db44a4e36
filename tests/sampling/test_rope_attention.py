"""The plan with one kernel for rotation and attention, which here runs on the host."""

import pytest
import torch

from blip3o_fast import SamplingPlan
from blip3o_fast.ops import Impl

HEADS_OF_64 = {"hidden_size": 192, "num_attention_heads": 3, "num_hidden_layers": 1}


@pytest.mark.parametrize(
    ("conventions", "scale"),
    [
        ("consistent", 1.0),
        ("published", 2.0),
        pytest.param("consistent", 2.0, marks=pytest.mark.slow),
        pytest.param("published", 1.0, marks=pytest.mark.slow),
    ],
)
def test_one_kernel_gives_what_two_give(emulated_cuda, make_model, draw, conventions, scale):
    """To the rounding of bf16: it is not further from fp32 than twice the other."""
    model = make_model(conventions=conventions, **HEADS_OF_64)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    eva, noise = draw(model)

    def run(dtype, impl):
        model.set_impl(rope_attention=impl)
        return SamplingPlan(model, steps=2, guidance_scale=scale, dtype=dtype)(eva, noise)

    exact, two = (run(dtype, None) for dtype in (torch.float32, torch.bfloat16))
    assert not emulated_cuda
    one = run(torch.bfloat16, Impl.CUDA)
    evaluations, attentions = 4, 2 if conventions == "consistent" else 1
    assert len(emulated_cuda) == evaluations * attentions
    errors = [float((x - exact).norm() / exact.norm()) for x in (one, two)]
    assert errors[0] < 2 * errors[1] < 0.05, errors


def test_heads_of_another_width_are_refused(emulated_cuda, model, draw):
    model.set_impl(rope_attention=Impl.CUDA)
    with pytest.raises(ValueError, match="takes heads of 64, got 8"):
        SamplingPlan(model, steps=1, dtype=torch.bfloat16)(*draw(model))
