"""How many calls lead from ``generate`` to a kernel, and who still sees an operator there."""

import sys

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from blip3o_fast import generate
from blip3o_fast.ops import Impl, _record, swiglu

MOST = 9
"""generate, plan, loop, advance, velocity, network, block, join, op: then the function that
launches the kernel."""


@pytest.fixture
def stacks(monkeypatch):
    """For each launch by Triton: its launcher, and the names of the frames above it."""
    found = []
    find = _record.find_launcher

    def watched(kernels, launcher):
        launch = find(kernels, launcher)

        def noted(*arguments):
            frame, names = sys._getframe(1), []
            while frame is not None and frame.f_code.co_name != "generate":
                names.append(frame.f_code.co_name)
                frame = frame.f_back
            found.append((f"{kernels}.{launcher}", names))
            return launch(*arguments)

        return noted

    monkeypatch.setattr(_record, "find_launcher", watched)
    return found


def test_generate_to_a_kernel(model, draw, stacks):
    eva, noise = draw(model)
    model.set_impl(Impl.TRITON)
    generate(model, eva, noise=noise, num_inference_steps=1, use_heun=False)
    depth = {launcher: len(names) + 1 for launcher, names in stacks}
    assert {"sandwich_join.forward", "swiglu.forward", "solver_update.forward"} <= set(depth)
    assert depth["sandwich_join.forward"] <= MOST and depth["solver_update.forward"] <= MOST, stacks


class Seen(TorchDispatchMode):
    """The names of the operators that pass."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_whoever_watches_sees_an_operator():
    x = torch.randn(2, 3, 16)
    name = "blip3o_fast::swiglu"

    def run(x):
        return swiglu(x, impl=Impl.TRITON)

    with torch.no_grad():
        with Seen() as seen:
            run(x)
        assert name in seen.names
        traced = make_fx(run)(x)
        assert any("swiglu" in str(node.target) for node in traced.graph.nodes)
        with torch.profiler.profile() as profile:
            run(x)
        assert name in {event.key for event in profile.key_averages()}
        assert any("swiglu" in str(node) for node in torch.jit.trace(run, x).graph.nodes())
