"""The solver update kernel against the fp64 reference, and bit by bit against the reference."""

import itertools

import pytest
import torch

from blip3o_fast import ops, reference
from tests.kernels.oracle import DTYPES, judge, laid_out, randn, repeats

pytestmark = pytest.mark.usefixtures("poisoned_memory")

IMPL = ops.Impl.TRITON
WIDE = (torch.float32, torch.float64)


def inputs(batch, tokens, width, rows, dtype=torch.float32, device="cpu", *, model=None, halves=1):
    """State, velocity, slopes and coefficients."""
    shape = (batch, tokens, width)
    return [
        randn(*shape, dtype=dtype, device=device),
        randn(halves * batch, tokens, width, dtype=model or dtype, device=device, seed=1),
        randn(rows, *shape, dtype=dtype, device=device, seed=2),
        randn(rows + 2, dtype=dtype, device=device, seed=3),
    ]


def number(value, device="cpu"):
    """A slot."""
    return None if value is None else torch.tensor([value], device=device)


def compare(values, clamp=None, **options):
    """Judge the new state and the slopes that were kept; ``values`` are left as they are."""
    wide = [x.double() for x in values]
    clamp = None if clamp is None else values[3].new_full((1,), clamp)
    truth = reference.solver_update(
        *wide, clamp=clamp if clamp is None else clamp.double(), **options
    )
    options["clamp"] = clamp
    same_slopes, got_slopes = values[2].clone(), values[2].clone()
    same = reference.solver_update(*values[:2], same_slopes, values[3], **options)
    got = ops.solver_update(*values[:2], got_slopes, values[3], impl=IMPL, **options)
    judge("state", got, same, truth)
    judge("slopes", got_slopes, same_slopes, wide[2])
    # A kernel holds 48 bits of the guidance, which is a Python float.
    if got.dtype == torch.float32:
        assert torch.equal(got, same) and torch.equal(got_slopes, same_slopes)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("model", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 7, 8, 123])
def test_widths_and_dtypes(device, dtype, model, width):
    values = inputs(2, 3, width, 2, dtype, device, model=model)
    compare(values, slot=number(1, device))


@pytest.mark.parametrize("tokens", [1, 63, 255, 257])
def test_tokens(device, tokens):
    compare(inputs(2, tokens, 8, 1, model=torch.bfloat16, device=device), slot=number(0, device))


@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
def test_several_programs(device, layout):
    x, velocity, *rest = inputs(1, 3, 2050, 2, model=torch.bfloat16, device=device)
    compare([x, laid_out(velocity, layout), *rest], slot=number(0, device))


@pytest.mark.parametrize("rows", range(9))
def test_rows(device, rows):
    for slot in (None, -1, *range(rows)):
        values = inputs(1, 2, 8, rows, model=torch.bfloat16, device=device)
        compare(values, slot=number(slot, device))


@pytest.mark.parametrize(
    "guidance, clamp, slot, width",
    list(itertools.product([1.0, 2.5, 0.0], [None, 0.7, 0.0, torch.inf], [None, 1], [8, 14])),
)
def test_options(device, guidance, clamp, slot, width):
    halves = 1 if guidance == 1 else 2
    values = inputs(2, 5, width, 2, model=torch.bfloat16, device=device, halves=halves)
    compare(values, guidance_scale=guidance, clamp=clamp, slot=number(slot, device))


@pytest.mark.parametrize("layout", ["sliced", "spread", "halves", "transposed", "expanded"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_layouts(device, layout, guidance):
    options = {"guidance_scale": guidance, "slot": number(0, device)}
    halves = 1 if guidance == 1 else 2
    x, velocity, *rest = inputs(3, 5, 16, 2, device=device, halves=halves)
    compare([x, laid_out(velocity, layout), *rest], **options)
    compare([laid_out(x, layout), velocity, *rest], **options)
    compare([laid_out(x, layout), laid_out(velocity.bfloat16(), layout), *rest], **options)


@pytest.mark.parametrize("start, apart", [(0, 72), (0, 49), (1, 48), (3, 53)])
@pytest.mark.parametrize("width", [5, 8])
def test_rows_of_a_larger_ring(device, start, apart, width):
    """A smaller batch uses the front of every row, and leaves what lies between."""
    x, velocity, slopes, coefficients = inputs(2, 3, width, 3, device=device)
    memory = slopes.new_full((start + 3 * apart,), torch.nan)
    ring = memory[start:].as_strided(slopes.shape, (apart, 3 * width, width, 1)).copy_(slopes)
    before = memory.isnan().sum()
    options = {"slot": number(1, device)}
    got = ops.solver_update(x, velocity, ring, coefficients, impl=IMPL, **options)
    assert torch.equal(got, reference.solver_update(x, velocity, slopes, coefficients, **options))
    assert torch.equal(ring, slopes) and memory.isnan().sum() == before


@pytest.mark.parametrize("strided", ["columns", "contiguous"])
def test_coefficients_of_a_table(device, strided):
    values = inputs(2, 3, 8, 2, device=device)
    table = torch.full((4, 3), torch.nan, device=device)
    table[:, 1] = values[3]
    compare([*values[:3], table[:, 1] if strided == "columns" else table[:, 1].contiguous()])


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("width", [7, 16])
def test_in_place(device, guidance, width):
    """The state is overwritten, also where the velocity is the state."""
    halves = 1 if guidance == 1 else 2
    x, velocity, slopes, coefficients = inputs(2, 5, width, 2, device=device, halves=halves)
    options = {
        "slot": number(1, device),
        "guidance_scale": guidance,
        "clamp": torch.full((1,), 2.0, device=device),
    }
    for v in (velocity, x) if guidance == 1 else (velocity,):
        state, kept = x.clone(), slopes.clone()
        expected = reference.solver_update(x, v, slopes.clone(), coefficients, **options)
        v = state if v is x else v
        got = ops.solver_update(state, v, kept, coefficients, out=state, impl=IMPL, **options)
        assert got is state and torch.equal(state, expected)


@pytest.mark.parametrize("start", [0, 1])
def test_given_memory(device, start):
    x, *rest = inputs(2, 5, 8, 1, device=device)
    memory = x.new_full((x.numel() + 2,), torch.nan)
    before, out = x.clone(), memory[start : start + x.numel()].view_as(x)
    got = ops.solver_update(x, *rest, out=out, impl=IMPL)
    assert got is out and torch.equal(x, before) and memory.isnan().sum() == 2
    assert torch.equal(out, reference.solver_update(x, *rest))


@pytest.mark.parametrize("batch, tokens, width", [(0, 5, 8), (2, 0, 8), (2, 5, 0)])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_empty(device, batch, tokens, width, guidance):
    halves = 1 if guidance == 1 else 2
    values = inputs(batch, tokens, width, 2, device=device, halves=halves)
    got = ops.solver_update(*values, guidance_scale=guidance, slot=number(0, device), impl=IMPL)
    assert got.shape == (batch, tokens, width)


@pytest.mark.parametrize("slot", [-1, 1, 3, 4, 2**40, -(2**40)])
@pytest.mark.parametrize("width", [7, 8])
def test_rows_without_a_coefficient_are_not_read(device, slot, width):
    """Nor is anything written where there is no such row."""
    x, velocity, slopes, coefficients = inputs(2, 3, width, 4, device=device)
    coefficients[3] = coefficients[5] = 0
    slopes[1] = slopes[3] = torch.nan
    expected = reference.solver_update(
        x, velocity, slopes[::2].clone(), coefficients[[0, 1, 2, 4]], slot=None
    )
    after = slopes.clone()
    if 0 <= slot < 4:
        after[slot] = velocity
    got = ops.solver_update(x, velocity, slopes, coefficients, slot=number(slot, device), impl=IMPL)
    assert torch.equal(got, expected)
    torch.testing.assert_close(slopes, after, rtol=0, atol=0, equal_nan=True)


def test_numbers_keep_their_precision_in_fp64(device):
    """1/3 rounded to fp32 would show in the ninth digit."""
    x, velocity, slopes, _ = inputs(2, 5, 14, 1, torch.float64, device, halves=2)
    thirds = torch.tensor([1.0, 1 / 3, 1 / 7], dtype=torch.float64, device=device)
    compare([x, velocity, slopes, thirds], guidance_scale=1 / 11, clamp=1 / 9)


def test_clamp_leaves_nan_and_bounds_infinity(device):
    x = torch.tensor([[[torch.nan, torch.inf, -torch.inf, 3.0]]], device=device)
    numbers = torch.ones(2, device=device)
    none = x.new_empty(0, *x.shape)
    for bound in (2.0, torch.inf):
        clamp, v = torch.tensor([bound], device=device), torch.zeros_like(x)
        got = ops.solver_update(x, v, none, numbers, clamp=clamp, impl=IMPL)
        torch.testing.assert_close(got, x.clamp(-bound, bound), rtol=0, atol=0, equal_nan=True)


def test_a_velocity_that_is_not_finite_shows(device):
    """Also with a coefficient of zero: only rows of slopes may be left unread."""
    x, velocity, slopes, coefficients = inputs(1, 1, 8, 1, device=device)
    velocity[0, 0, 3], coefficients[1] = torch.nan, 0
    got = ops.solver_update(x, velocity, slopes, coefficients, slot=number(0, device), impl=IMPL)
    assert got.isnan().nonzero().tolist() == slopes[0].isnan().nonzero().tolist() == [[0, 0, 3]]


def test_bitwise_repeatable_and_batch_invariant(device):
    values = inputs(8, 33, 46, 3, model=torch.bfloat16, device=device)
    slot = number(2, device)

    def run(batch):
        x, velocity, slopes = values[0][batch], values[1][batch], values[2][:, batch].clone()
        return ops.solver_update(x, velocity, slopes, values[3], slot=slot, impl=IMPL), slopes

    first, *others = (run(slice(None)) for _ in range(repeats(device)))
    assert all(torch.equal(a, b) for other in others for a, b in zip(other, first, strict=True))
    state, slopes = run(slice(5, 6))
    assert torch.equal(state, first[0][5:6]) and torch.equal(slopes, first[1][:, 5:6])


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_offsets_beyond_int32(device, guidance):
    """The third sample, half and row of slopes lie 2^31 elements after the first."""
    far, halves = 2**30, 1 if guidance == 1 else 2
    # Untouched memory takes no room on a CPU; empty_strided is not poisoned.
    memory = torch.empty_strided((2 * far + 64,), (1,), device=device)
    size = ((3 * halves - 1) * far + 64,)
    of_model = torch.empty_strided(size, (1,), device=device, dtype=torch.bfloat16)
    x, velocity, slopes, coefficients = inputs(3, 1, 8, 3, device=device, halves=halves)
    far_x = memory.as_strided(x.shape, (far, 8, 1)).copy_(x)
    far_velocity = of_model.as_strided(velocity.shape, (far, 8, 1)).copy_(velocity)
    far_slopes = memory[8:].as_strided(slopes.shape, (far, 8, 8, 1)).copy_(slopes)
    options = {"slot": number(2, device), "guidance_scale": guidance, "impl": IMPL}
    near = ops.solver_update(x, far_velocity.clone(), slopes, coefficients, **options)
    got = ops.solver_update(far_x, far_velocity, far_slopes, coefficients, **options)
    assert torch.equal(got, near) and torch.equal(far_slopes, slopes)
