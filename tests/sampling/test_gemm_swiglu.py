"""The plan with one kernel for the gate-up product and SwiGLU, which is interpreted on a CPU."""

import pytest
import torch

from blip3o_fast import SamplingPlan
from blip3o_fast.ops import Impl
from blip3o_fast.ops.gemm_swiglu import GEMM_SWIGLU


def test_one_kernel_gives_what_two_give(device, make_model, draw):
    """To the rounding of fp16: it is not further from fp32 than twice the other."""
    if reason := GEMM_SWIGLU.triton(torch.empty(0, dtype=torch.float16, device=device)):
        pytest.skip(reason)
    model = make_model(num_hidden_layers=1).to(device)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    eva, noise = draw(model)

    def run(dtype, impl):
        model.set_impl(gemm_swiglu=impl)
        return SamplingPlan(model, steps=1, dtype=dtype)(eva, noise)

    exact, two = (run(dtype, None) for dtype in (torch.float32, torch.float16))
    one = run(torch.float16, Impl.TRITON)
    errors = [float((x - exact).norm() / exact.norm()) for x in (one, two)]
    assert errors[0] < 2 * errors[1] < 0.05, errors
    assert not torch.equal(one, two)


def test_training_runs_two(model, draw):
    """One kernel would refuse fp32, and gradients."""
    model.set_impl(gemm_swiglu=Impl.TRITON)
    eva, noise = draw(model)
    model(noise, torch.zeros(len(eva)), eva, return_dict=False).sum().backward()
    with pytest.raises(ValueError, match=r"gemm_swiglu: impl=TRITON on a .*float32"):
        SamplingPlan(model, steps=1, dtype=torch.float32)(eva, noise)
