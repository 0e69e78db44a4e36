"""How many kernels one evaluation of base launches, counted without running it."""

from collections import Counter

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from blip3o_fast import DiTConfig
from blip3o_fast.flow import find_solver, time_grid
from blip3o_fast.model import DiT
from blip3o_fast.ops import Impl, ImplTable, quantised
from blip3o_fast.sampling.conditioning import condition
from blip3o_fast.sampling.engine import Engine, EngineKey
from blip3o_fast.sampling.stepper import Method, Stepper

LIMIT = 180
CONVENTIONS = ("consistent", "published")


class Launches(TorchDispatchMode):
    """Counts every op that writes memory: a fused op is one, a view none."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        silent = func.is_view or func.namespace == "prim" or func.name() in _SILENT
        if not silent:
            self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


_SILENT = {"aten::_unsafe_view", "aten::empty_like"}  # neither launches anything


def launches(device, conventions, solver, scale=1.0, dtype=torch.bfloat16, **exceptions):
    """Launches of one step, and of it the number by op; ``exceptions`` are not by Triton."""
    with FakeTensorMode(), torch.no_grad():
        with torch.device(device):
            model = DiT(DiTConfig.preset("base", conventions=conventions))
            eva, state = torch.empty(2, 256, 4096), torch.empty(2, 256, 1024)
        impls = ImplTable()
        impls.set(Impl.TRITON, **exceptions)
        key = EngineKey(model.config, dtype, tuple(vars(impls).values()), False)
        engine = Engine(model, key)
        method = Method(find_solver(solver), scale)
        table = engine.table(model, time_grid("ascending", 4), method.solver, torch.float32)
        context = condition(engine.weights, model.config, eva, guided=method.guided, impls=impls)
        stepper = Stepper(
            engine.evaluate, engine.weights.norms, method, table, state, context, Impl.TRITON
        )
        with Launches() as counter:
            stepper.advance()
    return counter.counts


@pytest.mark.parametrize("solver", ["euler", "heun", "midpoint", "adams_bashforth2"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("conventions", CONVENTIONS)
def test_launches_of_an_evaluation(device, conventions, scale, solver):
    counts = launches(device, conventions, solver, scale)
    evaluations = len(find_solver(solver).fractions)
    assert counts.total() / evaluations <= LIMIT, counts


def test_what_is_launched(device):
    """14 launches a block, 13 where cross-attention has no positions."""
    consistent = launches(device, "consistent", "euler")
    published = launches(device, "published", "euler")
    matrices = consistent["aten::mm"] + consistent["aten::addmm"]
    assert matrices == 12 * 6 + 2
    assert consistent["blip3o_fast::rope_"] == 24 and published["blip3o_fast::rope_"] == 12
    assert consistent["blip3o_fast::sandwich_join"] == 37
    assert published["blip3o_fast::sandwich_join"] == 36
    assert consistent["blip3o_fast::sandwich_norm"] == 0
    assert published["blip3o_fast::sandwich_norm"] == 1
    assert consistent["blip3o_fast::swiglu"] == 12
    assert consistent["aten::addcmul"] == 1 and published["aten::addcmul"] == 0


@pytest.mark.parametrize("conventions", CONVENTIONS)
def test_fp8_launches_nothing_more(device, monkeypatch, conventions):
    """The ops that compute the rows of a product quantise them."""
    monkeypatch.setattr(quantised, "e4m3_refusal", lambda device: None)
    bf16 = launches(device, conventions, "euler")
    fp8 = launches(device, conventions, "euler", dtype=torch.float8_e4m3fn)
    assert fp8.total() == bf16.total()
    assert fp8["aten::_scaled_mm"] == 12 * 4
    assert fp8["aten::mm"] + fp8["aten::addmm"] == 12 * 2 + 2
    assert fp8["blip3o_fast::sandwich_join"] == 1
    assert fp8["blip3o_fast::swiglu"] == 0 and fp8["blip3o_fast::swiglu_quantised"] == 12


@pytest.mark.parametrize("conventions, spared", [("consistent", 24), ("published", 12)])
@pytest.mark.usefixtures("emulated_cuda")
def test_one_kernel_for_rotation_and_attention(device, conventions, spared):
    two = launches(device, conventions, "euler")
    one = launches(device, conventions, "euler", rope_attention=Impl.CUDA)
    assert one["blip3o_fast_host::rope_attention"] == spared
    assert one["blip3o_fast::rope_"] == 0
    assert two.total() - one.total() == spared
