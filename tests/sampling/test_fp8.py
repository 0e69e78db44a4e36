"""FP8 plans: emulated on the CPU, and through ``torch._scaled_mm``, which a CPU has too."""

import copy
import functools
import itertools
from operator import attrgetter

import pytest
import torch
import torch.nn.functional as F
from golden_data import relative_error
from walking import plain_velocity, walk

from blip3o_fast import SamplingPlan, generate, reference
from blip3o_fast.flow import SOLVERS, time_grid
from blip3o_fast.ops import Impl, ImplTable, Quantised, quantise_rows, quantised
from blip3o_fast.sampling import batches, cache, packed, plan
from blip3o_fast.sampling.packed import E4M3, pack

EMULATED = {"dtype": E4M3, "impl": Impl.REFERENCE}
FITTING = {"intermediate_size": 32}  # with D = 16 and (H + 2K) d = 32 the hardware's multiples


@torch.no_grad()
def plain(model, eva, noise, solver="heun", scale=1.0):
    velocity = plain_velocity(model, eva, guided=scale != 1.0)
    return walk(velocity, noise, solver, time_grid((0.0, 0.3, 1.0), 2), guidance_scale=scale)


def sampled(model, eva, noise, solver="heun", scale=1.0, **options):
    options = {"guidance_scale": scale, "time_grid": (0.0, 0.3, 1.0), **options}
    return SamplingPlan(model, steps=2, solver=solver, **options)(eva, noise)


def restored(rows):
    return rows.values.float() * rows.scales


def rounded(x):
    """To e4m3 rows and back."""
    return restored(quantise_rows(x)).to(x.dtype)


@torch.no_grad()
def with_e4m3_products(model):
    """The plain model with e4m3 in the products that a plan makes FP8, and in no other."""
    model = copy.deepcopy(model)
    for block in model.layers():
        attention, cross, mlp = block.self_attn, block.cross_attn, block.mlp
        for projection in (
            *(attention.q_proj, attention.k_proj, attention.v_proj, cross.q_proj),
            *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
        ):
            projection.weight.copy_(rounded(projection.weight))
        for reader in (attention, cross.q_proj, mlp, mlp.down_proj):
            reader.register_forward_pre_hook(lambda _, args: (rounded(args[0]), *args[1:]))
    return model


def bound(model, eva, noise, solver="heun", scale=1.0):
    """Twice the error of e4m3 products alone, and that of bf16 alone, against fp32."""
    exact = plain(model, eva, noise, solver, scale)
    products = plain(with_e4m3_products(model), eva, noise, solver, scale)
    bf16 = sampled(model, eva, noise, solver, scale, dtype=torch.bfloat16)
    return 2 * (relative_error(products, exact) + relative_error(bf16, exact)), exact


each = pytest.mark.parametrize("conventions", ["consistent", "published"])
block = pytest.mark.parametrize("sandwich", [True, False], ids=["sandwich", "prenorm"])


@each
@block
def test_the_right_products_are_e4m3(make_model, draw, monkeypatch, conventions, sandwich):
    """With fp32 in the place of bf16: the plain model whose products round alike.

    The norm of the two is computed in another order. A number within that rounding of a boundary
    falls on its other side, which moves it by 2^-4; few do.
    """
    monkeypatch.setattr(packed, "activation_dtype", lambda dtype: torch.float32)
    monkeypatch.setattr(reference, "scaled_linear", lambda x, w: F.linear(*map(restored, (x, w))))
    model = make_model(conventions=conventions, use_sandwich_norm=sandwich, hidden_size=64)
    alike = with_e4m3_products(model)
    eva, noise = draw(model, 4)
    for solver, scale in itertools.product(SOLVERS, (1.0, 2.5)):
        got = sampled(model, eva, noise, solver, scale, **EMULATED)
        expected = plain(alike, eva, noise, solver, scale)
        error = relative_error(expected, plain(model, eva, noise, solver, scale))
        assert relative_error(got, expected) < 0.05 * error, (solver, scale)


@each
@block
def test_errs_no_more_than_its_two_roundings(make_model, draw, conventions, sandwich):
    model = make_model(conventions=conventions, use_sandwich_norm=sandwich)
    eva, noise = draw(model, 4)
    for solver, scale in itertools.product(SOLVERS, (1.0, 2.5)):
        allowed, exact = bound(model, eva, noise, solver, scale)
        got = sampled(model, eva, noise, solver, scale, **EMULATED)
        assert relative_error(got, exact) < allowed < 0.5, (solver, scale)  # 1: no bound at all


@pytest.mark.parametrize("impl", [None, Impl.REFERENCE])
def test_the_model_may_ask_for_the_emulation(model, draw, impl):
    eva, noise = draw(model)
    expected = sampled(model, eva, noise, **EMULATED)
    model.set_impl(Impl.REFERENCE)
    assert torch.equal(sampled(model, eva, noise, dtype=E4M3, impl=impl), expected)
    assert torch.equal(
        generate(model, eva, 2, noise=noise, dtype=E4M3, impl=impl),
        SamplingPlan(model, steps=2, **EMULATED)(eva, noise),
    )


@each
@pytest.mark.usefixtures("cpu_scales_rows")
@pytest.mark.parametrize("impl", [None, Impl.TRITON])
def test_through_scaled_mm(make_model, draw, monkeypatch, conventions, impl):
    """The path of a GPU on the CPU's own ``_scaled_mm``, kernels in the interpreter."""
    monkeypatch.setattr(quantised, "e4m3_refusal", lambda device: None)
    monkeypatch.setattr(plan, "e4m3_refusal", lambda device: None)
    model = make_model(conventions=conventions, num_hidden_layers=1, **FITTING)
    eva, noise = draw(model, 1)
    allowed, exact = bound(model, eva, noise, "euler")
    got = sampled(model, eva, noise, "euler", dtype=E4M3, impl=impl)
    assert relative_error(got, exact) < allowed


@pytest.mark.parametrize("impl", [None, Impl.TRITON, Impl.CUDA])
def test_refused_without_the_hardware(model, draw, impl):
    eva, noise = draw(model)
    refused = SamplingPlan(model, steps=1, dtype=E4M3, impl=impl)
    message = (
        "dtype=float8_e4m3fn: expected an NVIDIA GPU of compute capability 8.9 or at least 9.0, "
        "got cpu; pass dtype=torch.bfloat16, or impl=blip3o_fast.ops.Impl.REFERENCE"
    )
    for call in (lambda: refused(eva, noise), lambda: refused.check_device(torch.device("cpu"))):
        with pytest.raises(ValueError, match=message):
            call()
    assert model not in cache._ENGINES, "packed before it was refused"


def test_refused_where_only_some_ops_are_the_reference(model, draw):
    eva, noise = draw(model)
    for op in ("swiglu", "sandwich_join"):
        model.set_impl(Impl.REFERENCE, **{op: None})
        with pytest.raises(ValueError, match="dtype=float8_e4m3fn: expected an NVIDIA GPU"):
            sampled(model, eva, noise, dtype=E4M3)


def test_widths_that_the_hardware_does_not_take(model, draw, monkeypatch):
    monkeypatch.setattr(plan, "e4m3_refusal", lambda device: None)
    eva, noise = draw(model)
    with pytest.raises(ValueError, match=r"expected widths .* multiples of 16, got \(16, 24, 32\)"):
        sampled(model, eva, noise, dtype=E4M3)


def test_other_eight_bit_dtypes_are_unknown(model):
    with pytest.raises(ValueError, match=r"dtype: expected one of .*got torch.float8_e5m2"):
        SamplingPlan(model, steps=1, dtype=torch.float8_e5m2)


def test_packed_weights(model):
    """Each e4m3 number within half a step of the fp32 one that bf16 would have rounded."""
    wide, narrow = (pack(model, t, ImplTable()) for t in (torch.float32, torch.bfloat16))
    fp8 = pack(model, E4M3, ImplTable())
    assert fp8.dtype == torch.bfloat16 and fp8.quantised and not narrow.quantised
    saved = 0
    for ours, exact, half in zip(fp8.blocks, wide.blocks, narrow.blocks, strict=True):
        for name in (
            *("self_attn.project_weight", "cross_attn.project_weight"),
            *("mlp.gate_up_weight", "mlp.down_weight"),
        ):
            rows, weight = attrgetter(name)(ours), attrgetter(name)(exact)
            assert isinstance(rows, Quantised) and rows.scales.shape == (len(weight), 1)
            error = (restored(rows) - weight).abs()
            assert (error <= torch.maximum(weight.abs() / 15.99, rows.scales * 2.0**-10)).all()
            saved += 2 * weight.numel() - weight.numel() - 4 * len(weight)
        for name in ("self_attn.out_weight", "cross_attn.out_weight"):
            assert torch.equal(attrgetter(name)(ours), attrgetter(name)(half))
    assert torch.equal(fp8.keys_values, narrow.keys_values)
    assert torch.equal(fp8.output_proj.weight, narrow.output_proj.weight)
    assert narrow.nbytes() - fp8.nbytes() == saved


def test_changed_weights_are_packed_again(model, draw):
    eva, noise = draw(model)
    kept = SamplingPlan(model, steps=2, **EMULATED)
    before = kept(eva, noise)
    with torch.no_grad():
        model.blocks[1].mlp.down_proj.weight[0, 0] += 100
    after = kept(eva, noise)
    fresh = SamplingPlan(copy.deepcopy(model), steps=2, **EMULATED)(eva, noise)
    assert torch.equal(after, fresh) and not torch.equal(after, before)


def test_dtypes_of_one_model_do_not_mix(model, draw):
    eva, noise = draw(model)
    bf16 = sampled(model, eva, noise, dtype=torch.bfloat16)
    fp8 = sampled(model, eva, noise, **EMULATED)
    assert not torch.equal(bf16, fp8)
    assert torch.equal(sampled(model, eva, noise, dtype=torch.bfloat16), bf16)
    assert fp8.dtype == eva.dtype


def test_stated_memory_covers_the_emulation(make_model, draw):
    """Activations, and the fp32 copy of the widest weight that the emulation makes."""
    model = make_model(hidden_size=128, intermediate_size=384, num_tokens=256, grid=(1, 16, 16))
    eva, noise = draw(model, 4)
    sampled = SamplingPlan(model, steps=1, **EMULATED)
    sampled(eva, noise)
    with torch.profiler.profile(profile_memory=True) as profile:
        sampled(eva, noise)
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    found = cache.find_engine(model, E4M3, Impl.REFERENCE)
    config, dtype = model.config, found.working_dtype
    assert dtype == torch.float32
    stated = 4 * (
        max(batches.evaluation_bytes(config, dtype), batches.conditioning_bytes(config, dtype))
        + batches.state_bytes(config)
        + batches.context_bytes(config, dtype)
    )
    assert 0 < peak < stated + 2 * 384 * 128 * 4 + 2 * 128 * 1024


@pytest.mark.slow
def test_is_one_graph(make_model, draw, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    model = make_model(num_hidden_layers=1)
    eva, noise = draw(model)
    allowed, exact = bound(model, eva, noise, "euler")
    traced = sampled(model, eva, noise, "euler", compile=True, **EMULATED)
    assert relative_error(traced, exact) < allowed


@pytest.mark.gpu
@pytest.mark.parametrize("solver", SOLVERS)
def test_on_the_hardware(make_model, draw, solver):
    """Captured and eager agree bit by bit."""
    if refusal := quantised.e4m3_refusal(torch.device("cuda")):
        pytest.skip(refusal)
    model = make_model(**FITTING).cuda()
    eva, noise = draw(model, 3)
    allowed, exact = bound(model, eva, noise, solver)
    eager = sampled(model, eva, noise, solver, dtype=E4M3, graph=False)
    assert torch.equal(sampled(model, eva, noise, solver, dtype=E4M3), eager)
    assert relative_error(eager, exact) < allowed
