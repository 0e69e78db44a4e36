"""Weights that change between two calls are noticed: no plan is ever stale."""

import copy

import pytest
import torch
from golden_data import relative_error

from blip3o_fast import SamplingPlan
from blip3o_fast.sampling import cache


def optimizer_step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


def fused_optimizer_step(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


def swap_in_an_average(model):
    averages = [p.detach() * 0.5 for p in model.parameters()]
    with torch.no_grad():
        torch._foreach_copy_(list(model.parameters()), averages)


def swap_storage(model):
    for p in model.parameters():
        p.data = p.data * 0.5


def write_through_data(model):
    for p in model.parameters():
        p.data.mul_(0.5)


def load_state_dict(model):
    model.load_state_dict({name: 0.5 * p for name, p in model.state_dict().items()})


def load_state_dict_by_assignment(model):
    model.load_state_dict({n: 0.5 * p for n, p in model.state_dict().items()}, assign=True)


def one_weight(model):
    with torch.no_grad():
        model.blocks[1].mlp.down_proj.weight[0, 0] += 100


def replaced_parameter(model):
    model.output_proj.bias = torch.nn.Parameter(torch.full_like(model.output_proj.bias, 3.0))


def to_double_and_back(model):
    model.bfloat16().float()


@pytest.mark.parametrize(
    "change",
    [
        optimizer_step,
        fused_optimizer_step,
        swap_in_an_average,
        swap_storage,
        write_through_data,
        load_state_dict,
        load_state_dict_by_assignment,
        one_weight,
        replaced_parameter,
        to_double_and_back,
    ],
)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_change_of_weights(model, draw, change, dtype):
    eva, noise = draw(model)
    plan = SamplingPlan(model, steps=2, dtype=dtype)
    before = plan(eva, noise)
    change(model)
    after = plan(eva, noise)
    fresh = SamplingPlan(copy.deepcopy(model), steps=2, dtype=dtype)(eva, noise)
    assert torch.equal(after, fresh)
    assert not torch.equal(after, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_change_of_dtype(model, draw, dtype):
    eva, noise = draw(model)
    plan = SamplingPlan(model, steps=2)
    before = plan(eva, noise)
    model.to(dtype)
    after = plan(eva, noise)
    assert torch.equal(after, SamplingPlan(copy.deepcopy(model), steps=2)(eva, noise))
    assert 0 < relative_error(after, before) < 0.1


@pytest.mark.gpu
def test_change_of_device(model, draw):
    eva, noise = draw(model)
    plan = SamplingPlan(model, steps=2)
    before = plan(eva, noise)
    model.cuda()
    on_device = plan(eva.cuda(), noise)
    assert relative_error(on_device.cpu(), before) < 1e-3
    model.cpu()
    assert torch.equal(plan(eva, noise), before)


def test_a_model_under_inference_mode(make_model, draw):
    """Inference tensors carry no version counter."""
    with torch.inference_mode():
        model = make_model()
        eva, noise = draw(model)
        plan = SamplingPlan(model, steps=2)
        before = plan(eva, noise)
        model.blocks[0].mlp.up_proj.weight[1, 1] += 10
        assert not torch.equal(plan(eva, noise), before)


def test_unchanged_weights_are_packed_once(model, draw, monkeypatch):
    built = []
    pack = cache.pack

    def counted(*args):
        built.append(args)
        return pack(*args)

    monkeypatch.setattr(cache, "pack", counted)
    eva, noise = draw(model)
    for steps, solver in ((2, "heun"), (3, "euler"), (2, "heun")):
        SamplingPlan(model, steps=steps, solver=solver)(eva, noise)
    model.train().eval()
    model(noise, torch.zeros(2), eva)["velocity_prediction"].sum().backward()
    SamplingPlan(model, steps=2)(eva, noise)
    assert len(built) == 1
    optimizer_step(model)
    SamplingPlan(model, steps=2)(eva, noise)
    assert len(built) == 2
