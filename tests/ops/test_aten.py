"""ATen's few passes, the choice on a CPU in inference, against the fp64 reference."""

import pytest
import torch

from blip3o_fast import ops, reference
from blip3o_fast.ops import Impl, _aten, resolve_impl
from tests.kernels.oracle import DTYPES, check, laid_out, randn
from tests.ops.cases import CASES, EPS, outputs, solver_update, update_inputs

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BY_NAME = {case.name: case for case in CASES}
NAMES = [case.name for case in CASES if case.op.aten is not None]
LAYOUTS = ["contiguous", "sliced", "spread", "transposed", "expanded", "halves"]


def inference(case):
    def call(*tensors):
        with torch.no_grad():
            return case.call(*tensors, impl=Impl.ATEN)

    return call


def judge(case, values):
    def expected(*tensors):
        return case.call(*tensors, impl=Impl.REFERENCE)

    check(inference(case), expected, values, differentiable=[])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 7), (1, 1, 1), (3, 257, 24), (2, 5, 768)], ids=str)
def test_outputs(name, dtype, shape):
    batch, tokens, width = shape
    case = BY_NAME[name]
    judge(case, case.inputs(batch, tokens, width, dtype))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(name, layout):
    case = BY_NAME[name]
    values = case.inputs(2, 3, 12, torch.bfloat16)
    values[0] = laid_out(values[0], layout)
    judge(case, values)


@pytest.mark.parametrize("name", NAMES)
def test_wide_parameters_beside_a_narrow_stream(name):
    case = BY_NAME[name]
    values = case.inputs(2, 5, 16)
    rows = 2 if name == "sandwich_join" else 1
    judge(case, [x.bfloat16() if i < rows else x for i, x in enumerate(values)])


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("post", [False, True])
@pytest.mark.parametrize("pre", [False, True])
def test_absent_parts_of_a_join(scaled, post, pre):
    def join(op, *options):
        def call(x, y, layer_scale, *norms):
            first, second = reference.Modulation(*norms[:4]), reference.Modulation(*norms[4:])
            with torch.no_grad():
                return op(
                    x,
                    y,
                    layer_scale if scaled else None,
                    first if post else None,
                    second if pre else None,
                    **dict(options),
                )

        return call

    values = BY_NAME["sandwich_join"].inputs(2, 3, 14, torch.bfloat16)
    check(
        join(ops.sandwich_join, ("eps", EPS), ("impl", Impl.ATEN)),
        join(reference.sandwich_join, ("eps", EPS)),
        values,
        differentiable=[],
    )


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (3, 0), (0, 2), (5, 1)])
@pytest.mark.parametrize("inplace", [False, True])
def test_heads_of_rope(heads, kv_heads, inplace):
    qkv = randn(2, 5, (heads + 2 * kv_heads) * 6, dtype=torch.bfloat16)
    cos, sin = (randn(5, 6, seed=i) for i in (1, 2))
    counts = {"num_heads": heads, "num_kv_heads": kv_heads}

    def ours(qkv, cos, sin):
        mine = qkv.clone()
        with torch.no_grad():
            out = ops.rope(mine, cos, sin, **counts, inplace=inplace, impl=Impl.ATEN)
        assert (out is mine) is inplace
        assert inplace or torch.equal(mine, qkv)
        return out

    check(ours, lambda *t: reference.rope(*t, heads, kv_heads), [qkv, cos, sin], differentiable=[])


@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("slot", [None, -1, 0, 2, 3])
@pytest.mark.parametrize("guidance, clamp", [(1.0, None), (2.5, 0.7), (1.0, torch.inf)])
def test_solver_update_is_the_reference_bit_by_bit(rows, slot, guidance, clamp, monkeypatch):
    """Three samples, two at a time; rows without a coefficient hold NaN; v may be the state."""
    monkeypatch.setattr(_aten, "SOLVER_ELEMENTS", 2 * 5 * 7)
    x, velocity, slopes, coefficients = update_inputs(3, 5, 7, rows)
    coefficients[3:4], slopes[1:2] = 0, torch.nan
    velocity = velocity.bfloat16() if guidance == 1 else torch.cat((x, velocity))
    slot = None if slot is None else torch.tensor([slot])
    clamp = None if clamp is None else torch.tensor([clamp])
    options = {"slot": slot, "clamp": clamp, "guidance_scale": guidance}
    for v in (velocity, x) if guidance == 1 else (velocity,):
        for into in ("a new tensor", "given memory", "the state"):
            state, kept, expected_slopes = x.clone(), slopes.clone(), slopes.clone()
            out = {"given memory": torch.empty_like(x), "the state": state}.get(into)
            expected = reference.solver_update(x, v, expected_slopes, coefficients, **options)
            used = state if v is x else v
            with torch.no_grad():
                got = solver_update(
                    state, used, kept, coefficients, **options, out=out, impl=Impl.ATEN
                )
            assert torch.equal(got, expected) and (out is None or got is out)
            torch.testing.assert_close(kept, expected_slopes, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_solver_update(layout):
    x, velocity, slopes, coefficients = update_inputs(3, 5, 8)
    x, velocity = laid_out(x, layout), laid_out(velocity, layout)
    kept = slopes.clone()
    with torch.no_grad():
        got = solver_update(x, velocity, kept, coefficients, impl=Impl.ATEN)
    assert torch.equal(got, solver_update(x, velocity, slopes, coefficients, impl=Impl.REFERENCE))
    assert torch.equal(kept, slopes)


@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_left_alone(name):
    case = BY_NAME[name]
    values = case.inputs()
    before = [x.clone() for x in values]
    inference(case)(*values)
    assert all(torch.equal(a, b) for a, b in zip(values, before, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_no_samples(name):
    case = BY_NAME[name]
    for out in outputs(inference(case)(*case.inputs(batch=0))):
        assert out.shape[0] == 0


def test_chosen_where_no_gradient_is_recorded():
    x = torch.ones(1, 2, 4)
    assert resolve_impl(None, x, op="rope") is Impl.REFERENCE
    with torch.no_grad():
        assert resolve_impl(None, x, op="rope") is Impl.ATEN
        assert resolve_impl(None, x, op="swiglu") is Impl.REFERENCE
        assert resolve_impl(None, x.to("meta"), op="rope") is Impl.REFERENCE


def test_refusals_say_what_to_do():
    x = torch.ones(1, 2, 4)
    with pytest.raises(ValueError, match=r"no backward.*no_grad.*pass impl=Impl.REFERENCE"):
        resolve_impl(Impl.ATEN, x, op="rope")
    with torch.no_grad():
        with pytest.raises(
            ValueError, match=r"swiglu: impl=ATEN on .*this op has no ATen implementation"
        ):
            resolve_impl(Impl.ATEN, x, op="swiglu")
        with pytest.raises(ValueError, match="expected a CPU tensor"):
            resolve_impl(Impl.ATEN, x.to("meta"), op="rope")
