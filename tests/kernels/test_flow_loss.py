"""The flow loss kernels against the fp64 reference and the recorded losses."""

import itertools

import pytest
import torch
from golden_data import GOLDEN
from safetensors.torch import load_file

from blip3o_fast import RectifiedFlowLoss, ops, reference
from tests.kernels.oracle import DTYPES, check, laid_out, randn, repeats

pytestmark = pytest.mark.usefixtures("poisoned_memory")

TRITON = ops.Impl.TRITON
WEIGHTS = ops.LossWeights(1.0, 0.5, 0.2, 0.3)
CHOICES = list(itertools.product(["consistent", "published"], [False, True]))
TERMS = ops.LossTerms._fields


def compare(values, conventions="consistent", masks=False, weights=WEIGHTS, cotangent="contiguous"):
    """Cosines are rounded at magnitude 1 before they are taken from 1, so 1 is added again."""

    def call(loss, **impl):
        def op(*tensors):
            total, velocity, semantic, cosine, consistency = loss(
                *tensors, weights=weights, conventions=conventions, masks=masks, **impl
            )
            offset = weights.cosine + weights.consistency
            return total + offset, velocity, semantic, 1 + cosine, 1 + consistency

        return op

    check(
        call(ops.flow_loss, impl=TRITON),
        call(reference.flow_loss),
        values,
        differentiable=[0],
        cotangent=cotangent,
    )


def inputs(batch, tokens, width, dtype=torch.float32, device="cpu", *, data=None, scale=1.0):
    """Half the times lie on each side of the mask; the velocity is near its target."""
    shape = (batch, tokens, width)
    data = data or dtype
    x_1, noise = (randn(*shape, seed=i, scale=scale, dtype=torch.float64) for i in (1, 2))
    t = torch.linspace(0.0, 1.0, batch + 2, dtype=torch.float64)[1:-1].roll(batch // 2)
    x_t = torch.lerp(noise, x_1, t[:, None, None])
    velocity = x_1 - noise + randn(*shape, seed=3, scale=0.5 * scale, dtype=torch.float64)
    return [
        velocity.to(device, dtype),
        *(u.to(device, data) for u in (x_t, x_1, noise)),
        t.to(device, torch.promote_types(dtype, torch.float32)),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("conventions, masks", CHOICES)
def test_conventions(device, dtype, conventions, masks):
    compare(inputs(5, 6, 23, dtype, device), conventions, masks)


@pytest.mark.parametrize("width", [2, 7, 8, 123, 1024])
def test_widths(device, width):
    compare(inputs(2, 3, width, device=device))


@pytest.mark.parametrize("tokens", [1, 3, 63, 255, 257])
def test_tokens(device, tokens):
    compare(inputs(1, tokens, 8, torch.bfloat16, device), "published", True)


def test_more_samples_than_one_round_adds(device):
    compare(inputs(131, 2, 5, device=device), masks=True)


def test_one_sample(device):
    compare(inputs(1, 5, 14, device=device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wide_data(device, dtype):
    compare(inputs(3, 5, 14, dtype, device, data=torch.float32))


@pytest.mark.parametrize("layout", ["sliced", "spread", "halves", "transposed", "expanded"])
def test_layouts(device, layout):
    velocity, x_t, x_1, noise, t = inputs(3, 5, 14, device=device)
    t = laid_out(t[None], "spread")[0]
    compare([laid_out(velocity, layout), x_t, x_1, noise, t])
    compare([velocity, *(laid_out(u, layout) for u in (x_t, x_1, noise)), t])


@pytest.mark.parametrize("term", range(4))
@pytest.mark.parametrize("conventions", ["consistent", "published"])
def test_each_term_alone(device, term, conventions):
    weights = ops.LossWeights(*(float(i == term) for i in range(4)))
    compare(inputs(4, 5, 14, device=device), conventions, weights=weights)


@pytest.mark.parametrize("scale", [5.0, 50.0])
def test_caps_of_the_published_loss(device, scale):
    """The first scale caps a term or the total, the second every term that can be large."""
    values = inputs(4, 5, 14, device=device, scale=scale)
    values[0] = 3 * values[0]
    compare(values, "published", True)


def test_opposite_estimate_caps_the_cosine_terms(device):
    velocity, _, x_1, noise, t = inputs(4, 5, 14, device=device)
    compare([velocity, -x_1, x_1, noise, 0 * t + 1], "published")


@pytest.mark.parametrize("t", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("conventions, masks", CHOICES)
def test_ends_of_time(device, t, conventions, masks):
    """At 0.25 no sample counts under masks."""
    *values, times = inputs(3, 5, 14, device=device)
    compare([*values, torch.full_like(times, t)], conventions, masks)


def test_rows_of_zeros(device):
    """The norms are bounded below, as torch bounds them."""
    velocity, x_t, x_1, noise, t = inputs(3, 5, 14, device=device)
    for u in (velocity, x_t):
        u[1, 2] = 0
    x_1[0, 1] = 0
    compare([velocity, x_t, x_1, noise, t])
    compare([torch.zeros_like(u) for u in (velocity, x_t, x_1, noise)] + [t])


def test_upstream_gradient_scales(device):
    values = inputs(3, 5, 14, device=device)
    velocity = values[0].requires_grad_()
    loss = RectifiedFlowLoss(impl=TRITON)
    (once,) = torch.autograd.grad(loss(*values).total, velocity)
    (scaled,) = torch.autograd.grad(loss(*values).total * 1024, velocity)
    assert torch.equal(1024 * once, scaled)


@pytest.mark.parametrize("masks", [True, False])
def test_recorded_losses(device, masks):
    data = {k: v.to(device) for k, v in load_file(GOLDEN / "losses.safetensors").items()}
    loss = RectifiedFlowLoss(conventions="published", masks=masks, impl=TRITON)
    got = loss(*(data[k] for k in ("velocity", "xt", "x1", "noise", "t")))
    recorded = ("total", "velocity_loss", "semantic_loss", "cosine_loss", "consistency_loss")
    for term, name in zip(TERMS, recorded, strict=True):
        expected = data[f"{'masked' if masks else 'unmasked'}.{name}"].item()
        assert getattr(got, term).item() == pytest.approx(expected, rel=1e-5), term


def test_only_the_total_carries_a_gradient(device):
    values = inputs(3, 5, 14, device=device)
    values[0].requires_grad_()
    terms = RectifiedFlowLoss(impl=TRITON)(*values)
    assert [term.requires_grad for term in terms] == [True, False, False, False, False]
    assert all(term.dim() == 0 and term.dtype == torch.float32 for term in terms)


def test_bitwise_repeatable(device):
    values = inputs(2, 9, 46, torch.bfloat16, device)
    values[0].requires_grad_()
    runs = []
    for _ in range(repeats(device)):
        terms = RectifiedFlowLoss(impl=TRITON)(*values)
        runs.append((*terms, *torch.autograd.grad(terms.total, values[0])))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_nan_shows(device):
    values = inputs(3, 5, 14, device=device)
    values[0][1, 2, 3] = torch.nan
    for conventions in ("consistent", "published"):
        assert RectifiedFlowLoss(conventions=conventions, impl=TRITON)(*values).total.isnan()


def test_width_beyond_one_program(device):
    with pytest.raises(ValueError, match=r"width from 1 to 8192.*got 8193"):
        RectifiedFlowLoss(impl=TRITON)(*inputs(1, 1, 8193, device=device))
