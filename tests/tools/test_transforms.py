"""torch.func, second derivatives and functional calls of the model."""

import copy

import pytest
import torch
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import stateless

from tests.tools.models import build, inputs


def exact():
    model = build().double()
    x, t, eva = (a.double() for a in inputs(2))
    return x, lambda x: model(x, t, eva, return_dict=False)


@pytest.mark.parametrize("recording", [True, False])
def test_ensemble(recording):
    """vmap over the weights of several models."""
    models = [build(), build()]
    with torch.no_grad():
        for p in models[1].parameters():
            p.mul_(0.7)
    parameters, buffers = stack_module_state(models)
    skeleton = copy.deepcopy(models[0]).to("meta")
    arguments = (*inputs(), False)
    with torch.set_grad_enabled(recording):
        got = vmap(lambda p, b: functional_call(skeleton, (p, b), arguments))(parameters, buffers)
        expected = torch.stack([model(*arguments) for model in models])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected[0], expected[1], rtol=1e-2)


def test_states_in_parallel_without_gradients():
    model, (x, t, eva) = build(), inputs()
    states = torch.stack((x, 1 - x))
    with torch.no_grad():
        got = vmap(lambda x: model(x, t, eva, return_dict=False))(states)
        expected = torch.stack([model(x, t, eva, return_dict=False) for x in states])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_gradients_of_every_sample():
    model = build()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, *sample):
        batch = (a[None] for a in sample)
        return functional_call(model, parameters, (*batch, False)).square().sum()

    each = vmap(grad(loss), in_dims=(None, 0, 0, 0))(parameters, *inputs())
    model(*inputs(), return_dict=False).square().sum().backward()
    for name, p in model.named_parameters():
        if name != "pos_embed":
            assert (each[name].sum(0) - p.grad).norm() < 1e-4 * p.grad.norm(), name


def test_directional_derivative():
    x, velocity = exact()
    direction = torch.ones_like(x)
    with sdpa_kernel(SDPBackend.MATH):  # torch's fused kernels have no forward mode
        value, got = jvp(velocity, (x,), (direction,))
    step = 1e-5
    expected = (velocity(x + step * direction) - velocity(x - step * direction)) / (2 * step)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(value, velocity(x))


def test_second_derivative():
    x, velocity = exact()
    direction = torch.ones_like(x)

    def gradient(x, *, again=False):
        x = x.clone().requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):  # torch's fused kernels have no second derivative
            (g,) = torch.autograd.grad(velocity(x).square().sum(), x, create_graph=again)
        return x, g

    leaf, g = gradient(x, again=True)
    (got,) = torch.autograd.grad((g * direction).sum(), leaf)
    step = 1e-5
    ahead, behind = (gradient(x + sign * step * direction)[1] for sign in (1, -1))
    torch.testing.assert_close(got, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-5)


def test_a_chosen_kernel_of_attention():
    model, (x, t, eva) = build(), inputs()
    velocity, sample = model(x, t, eva, return_dict=False), model.generate(eva, 2, noise=x)
    with sdpa_kernel(SDPBackend.MATH):
        torch.testing.assert_close(model(x, t, eva, return_dict=False), velocity)
        torch.testing.assert_close(model.generate(eva, 2, noise=x), sample)


@pytest.mark.filterwarnings("ignore:.*functional_call:FutureWarning")
@pytest.mark.parametrize("call", [functional_call, stateless.functional_call])
def test_functional_call(call):
    model, scaled = build(), build()
    with torch.no_grad():
        for p in scaled.parameters():
            p.mul_(0.7)
    arguments = (*inputs(), False)
    before = model(*arguments)
    assert torch.equal(call(model, scaled.state_dict(), arguments), scaled(*arguments))
    assert torch.equal(model(*arguments), before) and not torch.equal(scaled(*arguments), before)
