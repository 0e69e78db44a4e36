"""The solver update kernel against the fp64 reference."""

import itertools

import pytest
import torch

from blip3o_fast import ops, reference
from tests.kernels.oracle import DTYPES, check, judge, laid_out, randn

pytestmark = pytest.mark.usefixtures("poisoned_memory")

IMPL = ops.Impl.TRITON
DT = 0.0213


def compare(values, **options):
    """``values`` are x, velocity and, where given, previous."""

    def call(update, **impl):
        def op(x, velocity, previous=None):
            dt = options.get("dt", DT)
            dt = dt.to(x) if isinstance(dt, torch.Tensor) else dt
            return update(x, velocity, previous=previous, **{**options, "dt": dt}, **impl)

        return op

    check(
        call(ops.solver_update, impl=IMPL),
        call(reference.solver_update),
        values,
        differentiable=[],
    )


def inputs(
    batch, tokens, width, dtype=torch.float32, device="cpu", *, model=None, count=3, halves=1
):
    model = model or dtype
    return [
        randn(batch if i == 0 else halves * batch, tokens, width, dtype=d, device=device, seed=i)
        for i, d in enumerate((dtype, model, model)[:count])
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 7, 8, 123])
def test_widths(device, dtype, width):
    compare(inputs(2, 3, width, dtype, device), weight=0.5, previous_weight=0.5)


@pytest.mark.parametrize("tokens", [1, 63, 255, 257])
def test_tokens(device, tokens):
    compare(
        inputs(2, tokens, 8, model=torch.bfloat16, device=device), weight=1.5, previous_weight=-0.5
    )


@pytest.mark.parametrize(
    "guidance, clamp, count, on_device",
    list(itertools.product([1.0, 2.5, 0.0], [None, 0.7], [2, 3], [False, True])),
)
def test_options(device, guidance, clamp, count, on_device):
    values = inputs(
        2, 5, 14, model=torch.bfloat16, device=device, count=count, halves=1 if guidance == 1 else 2
    )
    dt = torch.tensor(DT, device=device) if on_device else DT
    weights = {"weight": 0.5, "previous_weight": 0.5 if count == 3 else 0.0}
    compare(values, dt=dt, guidance_scale=guidance, clamp=clamp, **weights)


@pytest.mark.parametrize("model", DTYPES, ids=str)
def test_state_keeps_its_dtype(device, model):
    compare(inputs(2, 5, 24, torch.float32, device, model=model), weight=0.5, previous_weight=0.5)


def test_velocities_of_two_dtypes(device):
    x, velocity, previous = inputs(2, 5, 24, device=device)
    compare([x, velocity.bfloat16(), previous], weight=1.5, previous_weight=-0.5)


@pytest.mark.parametrize("layout", ["sliced", "spread", "halves", "transposed", "expanded"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_layouts(device, layout, guidance):
    x, velocity, previous = inputs(3, 5, 14, device=device, halves=1 if guidance == 1 else 2)
    compare(
        [x, laid_out(velocity, layout), previous],
        weight=0.5,
        previous_weight=0.5,
        guidance_scale=guidance,
    )
    compare(
        [laid_out(x, layout), velocity, laid_out(previous, layout)],
        previous_weight=0.5,
        guidance_scale=guidance,
    )


@pytest.mark.parametrize("batch, tokens", [(0, 5), (2, 0)])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_empty(device, batch, tokens, guidance):
    halves = 1 if guidance == 1 else 2
    compare(inputs(batch, tokens, 8, device=device, halves=halves), guidance_scale=guidance)


@pytest.mark.parametrize("on_device", [False, True])
def test_numbers_keep_their_precision_in_fp64(device, on_device):
    """1/3 rounded to fp32 would show in the ninth digit."""
    x, velocity = inputs(2, 5, 14, torch.float64, device, count=2)
    dt = torch.tensor(1 / 3, dtype=torch.float64, device=device) if on_device else 1 / 3
    got = ops.solver_update(x, velocity, dt, weight=1 / 7, clamp=1 / 9, impl=IMPL)
    expected = reference.solver_update(x, velocity, dt, weight=1 / 7, clamp=1 / 9)
    judge("state", got, expected, expected)


def test_clamp_leaves_nan_and_bounds_infinity(device):
    x = torch.tensor([[[torch.nan, torch.inf, -torch.inf, 3.0]]], device=device)
    got = ops.solver_update(x, torch.zeros_like(x), DT, clamp=2.0, impl=IMPL)
    expected = torch.tensor([[[torch.nan, 2.0, -2.0, 2.0]]], device=device)
    torch.testing.assert_close(got, expected, equal_nan=True)


def test_bitwise_repeatable_and_batch_invariant(device):
    values = inputs(8, 33, 46, model=torch.bfloat16, device=device)
    first, *others = (
        ops.solver_update(values[0], values[1], DT, previous=values[2], weight=0.5, impl=IMPL)
        for _ in range(20)
    )
    assert all(torch.equal(x, first) for x in others)
    x, velocity, previous = (u[5:6] for u in values)
    one = ops.solver_update(x, velocity, DT, previous=previous, weight=0.5, impl=IMPL)
    assert torch.equal(one, first[5:6])
