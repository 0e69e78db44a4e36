"""Learning rate, parameter groups, and updates that skip non-finite gradients."""

import math
import sys
import types

import pytest
import torch
from small_data import small_model
from torch import nn

from blip3o_fast.errors import OptionError
from blip3o_fast.training.clipping import AdaptiveClipper, global_norm
from blip3o_fast.training.optimizer import (
    Schedule,
    apply_gradients,
    choose_optimizer,
    make_optimizer,
    parameter_groups,
    require_apex,
    set_rate,
)


def test_rate_warms_up_from_a_tenth_then_falls_to_a_hundredth():
    schedule = Schedule(peak=2.0, warmup=10, total=110)
    assert schedule.rate(0) == pytest.approx(0.2)
    assert schedule.rate(5) == pytest.approx(2 * 0.55)
    assert schedule.rate(10) == pytest.approx(2.0)
    assert schedule.rate(60) == pytest.approx(2 * (0.01 + 0.99 / 2))
    assert schedule.rate(110) == pytest.approx(0.02)
    rates = [schedule.rate(step) for step in range(10, 111)]
    assert rates == sorted(rates, reverse=True)


def test_rate_equals_that_of_torchs_schedulers():
    """The published trainer chains LinearLR and CosineAnnealingLR."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-3)
    parts = [
        torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, total_iters=7),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=33, eta_min=3e-5),
    ]
    chained = torch.optim.lr_scheduler.SequentialLR(optimizer, parts, milestones=[7])
    ours = Schedule(3e-3, 7, 40)
    for step in range(40):
        assert ours.rate(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        chained.step()


def test_no_warmup_starts_at_the_peak():
    assert Schedule(1.0, 0, 5).rate(0) == 1.0


def test_only_matrices_decay():
    model = small_model()
    decayed, others = parameter_groups(model, 0.01)
    names = {id(p): name for name, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.01 and others["weight_decay"] == 0
    assert all(p.dim() == 2 for p in decayed["params"])
    kept = {names[id(p)].rpartition(".")[2] for p in others["params"]}
    assert kept == {
        "weight",
        "bias",
        "pos_embed",
        "layer_scale_1",
        "layer_scale_2",
        "layer_scale_3",
    }
    assert len(decayed["params"]) + len(others["params"]) == len(names)


@pytest.mark.parametrize("kind", ["fused", "foreach"])
def test_updates_equal_adamw_on_clipped_gradients(kind, options):
    torch.manual_seed(0)
    mine, theirs = small_model(), small_model()
    optimizer = make_optimizer(kind, mine, options(weight_decay=0.1))
    plain = torch.optim.AdamW(parameter_groups(theirs, 0.1), lr=1e-2)
    clipper = AdaptiveClipper(0.5, adaptive=False, device=torch.device("cpu"))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for _ in range(4):
        for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        set_rate(optimizer, 1e-2)
        apply_gradients(optimizer, scaler, clipper.clip(global_norm(mine.parameters())))
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        plain.step()
    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["fused", "foreach"])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_non_finite_gradient_changes_nothing(kind, bad, options):
    model = small_model()
    optimizer = make_optimizer(kind, model, options())
    clipper = AdaptiveClipper(1.0, adaptive=True, device=torch.device("cpu"))
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def step(value):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        model.input_proj.bias.grad[0] = value
        clip = clipper.clip(global_norm(model.parameters()))
        apply_gradients(optimizer, scaler, clip)
        return clip

    step(1.0)
    before = [p.clone() for p in model.parameters()]
    moments = [state["exp_avg"].clone() for state in optimizer.state.values()]
    steps = [int(state["step"]) for state in optimizer.state.values()]
    clip = step(bad)
    assert not clip.finite and int(clipper.recorded) == 1
    assert all(map(torch.equal, before, model.parameters()))
    assert all(map(torch.equal, moments, (s["exp_avg"] for s in optimizer.state.values())))
    assert steps == [int(state["step"]) for state in optimizer.state.values()]
    step(1.0)
    assert not torch.equal(before[0], next(model.parameters()))


def test_automatic_choice_and_apex_on_a_cpu(monkeypatch):
    assert choose_optimizer("auto", torch.device("cpu")) == "foreach"
    assert choose_optimizer("auto", torch.device("cuda")) == "fused"
    for name in ("apex", "apex.optimizers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(OptionError, match=r"no package 'apex'.*not 'pip install apex'"):
        require_apex()


def test_another_project_called_apex_is_recognised(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    with pytest.raises(OptionError, match="not NVIDIA's"):
        require_apex()


def test_apex_without_its_extension_is_refused(monkeypatch):
    optimizers = types.ModuleType("apex.optimizers")
    optimizers.FusedAdam = object
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)
    with pytest.raises(OptionError, match="amp_C"):
        require_apex()
    monkeypatch.setitem(sys.modules, "amp_C", types.ModuleType("amp_C"))
    assert require_apex() is object
    with pytest.raises(OptionError, match="expects a CUDA device, got cpu"):
        choose_optimizer("apex", torch.device("cpu"))
