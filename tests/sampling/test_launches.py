"""How many kernels one evaluation of base launches, counted without running it."""

from collections import Counter

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from blip3o_fast import DiTConfig, SamplingPlan
from blip3o_fast.flow import SOLVERS
from blip3o_fast.model import DiT
from blip3o_fast.ops import Impl, quantised

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


def launches(device, conventions, solver="euler", scale=1.0, dtype=torch.bfloat16, **exceptions):
    """Launches of one turn of the loop, by op; ``exceptions`` are not by Triton."""
    with FakeTensorMode(), torch.no_grad():
        with torch.device(device):
            model = DiT(DiTConfig.preset("base", conventions=conventions))
            eva, noise = torch.empty(2, 256, 4096), torch.empty(2, 256, 1024)
        model.set_impl(Impl.TRITON, **exceptions)
        plan = SamplingPlan(model, steps=4, solver=solver, guidance_scale=scale, dtype=dtype)
        trajectory = plan.start(eva, noise)
        with Launches() as counter:
            trajectory.advance()
    return counter.counts


@pytest.mark.parametrize(
    ("conventions", "solver", "scale"),
    [
        pytest.param(
            conventions,
            solver,
            scale,
            # Solvers differ in numbers that a kernel reads, not in what is launched.
            marks=() if (conventions == "consistent" or solver == "heun") else pytest.mark.slow,
        )
        for conventions in CONVENTIONS
        for solver, scale in [*((solver, 1.0) for solver in SOLVERS), ("heun", 2.0)]
    ],
)
def test_launches_of_an_evaluation(device, conventions, solver, scale):
    counts = launches(device, conventions, solver, scale)
    assert counts.total() <= LIMIT, counts


def test_what_is_launched(device):
    """14 launches a block, 13 where cross-attention has no positions."""
    consistent = launches(device, "consistent")
    published = launches(device, "published")
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
    bf16 = launches(device, conventions)
    fp8 = launches(device, conventions, dtype=torch.float8_e4m3fn)
    assert fp8.total() == bf16.total()
    assert fp8["aten::_scaled_mm"] == 12 * 4
    assert fp8["aten::mm"] + fp8["aten::addmm"] == 12 * 2 + 2
    assert fp8["blip3o_fast::sandwich_join"] == 1
    assert fp8["blip3o_fast::swiglu"] == 0 and fp8["blip3o_fast::swiglu_quantised"] == 12


@pytest.mark.parametrize("conventions, spared", [("consistent", 24), ("published", 12)])
@pytest.mark.usefixtures("emulated_cuda")
def test_one_kernel_for_rotation_and_attention(device, conventions, spared):
    two = launches(device, conventions)
    one = launches(device, conventions, rope_attention=Impl.CUDA)
    assert one["blip3o_fast_host::rope_attention"] == spared
    assert one["blip3o_fast::rope_"] == 0
    assert two.total() - one.total() == spared
