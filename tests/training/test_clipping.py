"""The brief's adaptive rule, against a few lines of plain Python, on unscaled norms."""

import pytest
import torch
from torch import nn

from blip3o_fast.training.clipping import AdaptiveClipper, global_norm
from blip3o_fast.training.optimizer import apply_gradients

CPU = torch.device("cpu")


def bounds_by_the_rule(norms, max_norm):
    """Window of the last ten norms of taken steps, the present one not among them."""
    window, bounds = [], []
    for norm in norms:
        high = len(window) >= 10 and sum(window[-10:]) / 10 > 2 * max_norm
        bounds.append(0.5 * max_norm if high else max_norm)
        if norm < float("inf"):
            window.append(norm)
    return bounds


@pytest.mark.parametrize("max_norm", [0.5, 1.0])
def test_bounds_follow_the_rule(max_norm):
    generator = torch.Generator().manual_seed(0)
    norms = (4 * torch.rand(200, generator=generator)).tolist()
    norms[50:70] = [0.1] * 20
    norms[17] = norms[95] = float("inf")
    norms[18] = float("nan")
    clipper = AdaptiveClipper(max_norm, adaptive=True, device=CPU)
    decided = [clipper.clip(torch.tensor(norm)) for norm in norms]
    expected = bounds_by_the_rule(norms, max_norm)
    assert [float(clip.bound) for clip in decided] == expected
    assert {0.5 * max_norm, max_norm} == set(expected), "both branches are exercised"
    for norm, clip in zip(norms, decided, strict=True):
        assert bool(clip.finite) == (norm < float("inf"))
        if clip.finite:
            expected = min(1, float(clip.bound) / (norm + 1e-6))
            # A sum, a quotient, and the norm itself, each rounded to fp32.
            assert float(clip.coefficient) == pytest.approx(expected, rel=3 * 2.0**-24)


def test_the_eleventh_step_is_the_first_that_can_be_tightened():
    clipper = AdaptiveClipper(1.0, adaptive=True, device=CPU)
    bounds = [float(clipper.clip(torch.tensor(3.0)).bound) for _ in range(12)]
    assert bounds == [1.0] * 10 + [0.5] * 2


def test_adaptation_and_clipping_can_be_turned_off():
    fixed = AdaptiveClipper(1.0, adaptive=False, device=CPU)
    assert {float(fixed.clip(torch.tensor(9.0)).bound) for _ in range(15)} == {1.0}
    never = AdaptiveClipper(0.0, adaptive=True, device=CPU)
    clips = [never.clip(torch.tensor(9.0)) for _ in range(15)]
    assert {float(clip.coefficient) for clip in clips} == {1.0}
    assert clips[0].bound.isinf()


def test_a_saved_window_continues():
    one = AdaptiveClipper(1.0, adaptive=True, device=CPU)
    for norm in (3.0, float("inf"), 2.5, 4.0):
        one.clip(torch.tensor(norm))
    other = AdaptiveClipper(1.0, adaptive=True, device=CPU)
    other.load_state_dict(one.state_dict())
    for norm in [3.0] * 12:
        assert one.clip(torch.tensor(norm)) == other.clip(torch.tensor(norm))


def test_norm_is_that_of_all_gradients_together():
    parameters = [nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(5))]
    for p in parameters:
        p.grad = torch.randn_like(p)
    together = torch.cat([p.grad.flatten() for p in parameters]).double().norm()
    assert float(global_norm(parameters)) == pytest.approx(float(together), rel=1e-6)


def test_a_loss_scale_of_65536_changes_neither_norm_nor_bound():
    """The published trainer clips scaled gradients: a norm of 0.7 looks like 46,000."""

    def run(scale):
        p = nn.Parameter(torch.zeros(4))
        optimizer = torch.optim.AdamW([p], lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale > 1)
        clipper = AdaptiveClipper(1.0, adaptive=True, device=CPU)
        clips = []
        for _ in range(12):
            optimizer.zero_grad()
            scaler.scale((p * torch.tensor([0.1, -0.4, 0.5, 0.2])).sum()).backward()
            scaler.unscale_(optimizer)
            clips.append(clipper.clip(global_norm([p])))
            apply_gradients(optimizer, scaler, clips[-1])
        return clips, p

    plain, p = run(1.0)
    scaled, q = run(65536.0)
    assert [float(clip.norm) for clip in scaled] == [float(clip.norm) for clip in plain]
    assert {float(clip.bound) for clip in scaled} == {1.0}
    assert torch.equal(p, q)
