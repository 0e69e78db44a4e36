"""The loss against recorded values, and its two sets of conventions."""

import pytest
import torch
from golden_data import GOLDEN
from safetensors.torch import load_file

from blip3o_fast import RectifiedFlowLoss
from blip3o_fast.flow import interpolate

TERMS = ("total", "velocity", "semantic", "cosine", "consistency")
RECORDED = ("total", "velocity_loss", "semantic_loss", "cosine_loss", "consistency_loss")


def exact_case(dtype=torch.float64):
    torch.manual_seed(0)
    x1, noise = torch.randn(2, 64, 16, 24, dtype=dtype)
    t = torch.linspace(0.02, 0.98, 64, dtype=dtype)
    return x1, noise, t, interpolate(x1, noise, t)


@pytest.mark.parametrize("masks", [True, False])
def test_published_values(masks):
    data = load_file(GOLDEN / "losses.safetensors")
    loss = RectifiedFlowLoss(conventions="published", masks=masks)
    got = loss(data["velocity"], x_t=data["xt"], x_1=data["x1"], noise=data["noise"], t=data["t"])
    prefix = "masked" if masks else "unmasked"
    for term, recorded in zip(TERMS, RECORDED, strict=True):
        expected = data[f"{prefix}.{recorded}"].item()
        assert getattr(got, term).item() == pytest.approx(expected, rel=1e-5), term


def test_consistent_loss_vanishes_at_the_exact_velocity():
    x1, noise, t, x_t = exact_case()
    terms = RectifiedFlowLoss()(x1 - noise, x_t=x_t, x_1=x1, noise=noise, t=t)
    for name, value in zip(TERMS, terms, strict=True):
        assert abs(value.item()) < 1e-12, name


def test_published_loss_does_not():
    """Its clean estimate has the wrong sign: semantic = mean over t > 1/2 of 4 (1 - t)^2 E[v^2]."""
    x1, noise, t, x_t = exact_case()
    v = x1 - noise
    terms = RectifiedFlowLoss(conventions="published")(v, x_t=x_t, x_1=x1, noise=noise, t=t)
    late = t > 0.5
    expected = (4 * (1 - t[late]) ** 2 * v[late].square().mean((1, 2))).mean()
    assert terms.semantic.item() == pytest.approx(expected.item(), rel=1e-9)
    assert terms.velocity.item() == pytest.approx(0, abs=1e-12)
    opposite = RectifiedFlowLoss(conventions="published")(-v, x_t=x_t, x_1=x1, noise=noise, t=t)
    assert opposite.semantic.item() == pytest.approx(0, abs=1e-12)
    assert opposite.cosine.item() == pytest.approx(0, abs=1e-12)


def test_masks_restrict_two_terms():
    x1, noise, t, x_t = exact_case()
    v = torch.zeros_like(x1)
    masked = RectifiedFlowLoss(masks=True)(v, x_t=x_t, x_1=x1, noise=noise, t=t)
    late = t > 0.5
    only_late = RectifiedFlowLoss()(
        v[late], x_t=x_t[late], x_1=x1[late], noise=noise[late], t=t[late]
    )
    plain = RectifiedFlowLoss()(v, x_t=x_t, x_1=x1, noise=noise, t=t)
    assert masked.semantic.item() == pytest.approx(only_late.semantic.item())
    assert masked.consistency.item() == pytest.approx(only_late.consistency.item())
    assert masked.cosine.item() == pytest.approx(plain.cosine.item())
    assert masked.velocity.item() == pytest.approx(plain.velocity.item())


def test_masks_over_no_sample_give_zero():
    x1, noise, _, _ = exact_case()
    t = torch.full((64,), 0.25, dtype=torch.float64)
    x_t = interpolate(x1, noise, t)
    terms = RectifiedFlowLoss(masks=True)(x1, x_t=x_t, x_1=x1, noise=noise, t=t)
    assert terms.semantic.item() == 0 and terms.consistency.item() == 0
    assert terms.total.isfinite()


def test_weights_add_up():
    x1, noise, t, x_t = exact_case()
    terms = RectifiedFlowLoss((2.0, 3.0, 5.0, 7.0))(x1, x_t=x_t, x_1=x1, noise=noise, t=t)
    total = 2 * terms.velocity + 3 * terms.semantic + 5 * terms.cosine + 7 * terms.consistency
    assert terms.total.item() == pytest.approx(total.item())


@pytest.mark.parametrize("conventions", ["consistent", "published"])
def test_gradient(conventions):
    x1, noise, t, x_t = (x[:3] for x in exact_case())
    v = torch.randn_like(x1, requires_grad=True)
    loss = RectifiedFlowLoss(conventions=conventions, masks=True)
    assert torch.autograd.gradcheck(
        lambda v: loss(v, x_t=x_t, x_1=x1, noise=noise, t=t).total, v, fast_mode=True
    )


def test_bad_choices():
    with pytest.raises(ValueError, match="weights: expected four non-negative numbers"):
        RectifiedFlowLoss((1.0, -0.5, 0.2, 0.3))
    with pytest.raises(ValueError, match="conventions: expected consistent or published"):
        RectifiedFlowLoss(conventions="both")
    x1, noise, t, x_t = exact_case()
    with pytest.raises(ValueError, match=r"x_t: expected shape \[B=64, N=16, C=24\]"):
        RectifiedFlowLoss()(x1, x_t=x_t[:, :8], x_1=x1, noise=noise, t=t)
