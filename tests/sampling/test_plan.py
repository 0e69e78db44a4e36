"""The plan against the plain model, and against recorded outputs of the published one."""

import copy
import itertools
from functools import partial

import pytest
import torch
from golden_data import MODELS, load_golden, relative_error
from rounding import rounding_bound, roundings_of
from walking import plain_velocity, walk

from blip3o_fast import BLIP3oDiT, DiTConfig, SamplingPlan
from blip3o_fast.flow import SOLVERS, time_grid
from blip3o_fast.ops import Impl
from tests.kernels.oracle import judge

UNEVEN = (0.0, 0.3, 1.0)


@torch.no_grad()
def plain(model, eva, noise, solver, scale=1.0, grid=UNEVEN, steps=2):
    velocity = plain_velocity(model, eva, guided=scale != 1.0)
    wide = noise.to(torch.promote_types(noise.dtype, torch.float32))
    return walk(velocity, wide, solver, time_grid(grid, steps), guidance_scale=scale)


def limit(model, dtype=torch.float32, steps=2):
    """How far a plan may be from the plain model: four evaluations a step at most."""
    return rounding_bound(dtype, roundings_of(model.config, 4 * steps))


@pytest.mark.parametrize(
    ("tokens", "batch"),
    [(256, 1), (256, 3), (257, 1), (257, 3), pytest.param(257, 64, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("conventions", ["consistent", "published"])
def test_equals_the_plain_model(make_model, draw, conventions, tokens, batch):
    mode = "cls_patch" if tokens == 257 else "patch_only"
    model = make_model(
        conventions=conventions,
        num_tokens=tokens,
        training_mode=mode,
        grid=(1, 16, 16),
        num_hidden_layers=1,
    )
    eva, noise = draw(model, batch)
    for solver, scale in itertools.product(SOLVERS, (1.0, 2.5)):
        plan = SamplingPlan(model, steps=2, solver=solver, guidance_scale=scale, time_grid=UNEVEN)
        expected = plain(model, eva, noise, solver, scale)
        assert relative_error(plan(eva, noise), expected) < limit(model), (solver, scale)


@pytest.mark.parametrize("conventions", ["consistent", "published"])
@pytest.mark.parametrize("mode", ["patch_only", "cls_patch"])
@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"use_sandwich_norm": False},
        {"use_3d_rope": False, "max_position_embeddings": 9},
        {"use_eva_adapter": False},
        {"layer_scale_init_value": 0.0},
        {"num_key_value_heads": 2, "use_grouped_query_attention": False},
    ],
    ids=lambda variant: next(iter(variant), "default"),
)
def test_every_variant_is_exact_in_fp64(make_model, draw, variant, mode, conventions):
    tokens = 7 if mode == "cls_patch" else 6
    model = make_model(
        conventions=conventions, training_mode=mode, num_tokens=tokens, **variant
    ).double()
    eva, noise = draw(model, 3)
    for solver, scale in itertools.product(SOLVERS, (1.0, 2.5)):
        plan = SamplingPlan(model, steps=2, solver=solver, guidance_scale=scale, time_grid=UNEVEN)
        error = relative_error(plan(eva, noise), plain(model, eva, noise, solver, scale))
        assert error < limit(model, torch.float64), (solver, scale)


@pytest.mark.parametrize("grid", ["ascending", "published", "published_trainer"])
@pytest.mark.parametrize("conventions", ["consistent", "published"])
def test_named_grids(make_model, draw, conventions, grid):
    model = make_model(conventions=conventions).double()
    eva, noise = draw(model)
    for solver in SOLVERS:
        plan = SamplingPlan(model, steps=5, solver=solver, time_grid=grid)
        expected = plain(model, eva, noise, solver, grid=grid, steps=5)
        error = relative_error(plan(eva, noise), expected)
        assert error < limit(model, torch.float64, steps=5), solver


def test_grid_follows_the_conventions(make_model, draw):
    for conventions, grid in (("consistent", "ascending"), ("published", "published")):
        model = make_model(conventions=conventions)
        eva, noise = draw(model)
        named = SamplingPlan(model, steps=3, time_grid=grid)(eva, noise)
        assert torch.equal(SamplingPlan(model, steps=3)(eva, noise), named)


def test_the_clamp_bounds_the_state(make_model, draw):
    model = make_model(conventions="published")
    torch.nn.init.constant_(model.output_proj.bias, 400.0)
    eva, noise = draw(model)
    out = SamplingPlan(model, steps=2)(eva, noise)
    assert out.max() == 50
    trainer = SamplingPlan(model, steps=2, time_grid="published_trainer")(eva, noise)
    assert trainer.max() == 10


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("solver", ["heun", "euler"])
@pytest.mark.parametrize("guidance", [1, 2])
@pytest.mark.filterwarnings("ignore:guidance_scale")
def test_golden(name, solver, guidance):
    golden = load_golden(name)
    model = BLIP3oDiT(DiTConfig.from_dict(golden.config)).eval()
    model.load_state_dict(golden.weights)
    plan = SamplingPlan(model, steps=golden.steps, solver=solver, guidance_scale=float(guidance))
    out = plan(golden.tensors["eva"], noise=golden.tensors["noise"])
    assert relative_error(out, golden.tensors[f"generate.{solver}.guidance{guidance}"]) < 1e-5


@pytest.mark.parametrize("conventions", ["consistent", "published"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_errs_no_more_than_the_plain_model(make_model, draw, dtype, conventions):
    model = make_model(conventions=conventions)
    eva, noise = draw(model, 8)
    truth = plain(model.double(), eva.double(), noise.double(), "heun")
    model.to(dtype)
    # The bound is that of the weights as rounded, which both share.
    allowed = relative_error(plain(model, eva, noise, "heun"), truth)
    for given in (None, dtype):
        plan = SamplingPlan(model, steps=2, time_grid=UNEVEN, dtype=given)
        assert relative_error(plan(eva, noise), truth) < 1.5 * allowed + 1e-4


def test_generate_passes_the_dtype_on(model, draw):
    eva, noise = draw(model)
    got = model.generate(eva, 2, noise=noise, dtype=torch.bfloat16)
    assert torch.equal(got, SamplingPlan(model, steps=2, dtype=torch.bfloat16)(eva, noise))
    assert not torch.equal(got, model.generate(eva, 2, noise=noise))


@pytest.mark.parametrize("conventions", ["consistent", "published"])
def test_dtype_of_the_plan_is_independent_of_the_models(make_model, draw, conventions):
    model = make_model(conventions=conventions)
    eva, noise = draw(model)
    truth = plain(copy.deepcopy(model).double(), eva.double(), noise.double(), "heun")
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        plan = SamplingPlan(model, steps=2, time_grid=UNEVEN, dtype=dtype)
        same = plain(copy.deepcopy(model).to(dtype), eva.to(dtype), noise.to(dtype), "heun")
        got = plan(eva.double(), noise.double())
        judge(str(dtype), got.to(dtype), same.to(dtype), truth, roundings_of(model.config, 4))


def test_output_has_the_dtype_of_the_features(model, draw):
    eva, noise = draw(model)
    plan = SamplingPlan(model, steps=1)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        assert plan(eva.to(dtype), noise).dtype == dtype


def test_autocast_decides_the_dtype_where_nothing_else_does(model, draw):
    eva, noise = draw(model)
    with torch.autocast("cpu", torch.bfloat16):
        inside = SamplingPlan(model, steps=2)(eva, noise)
    assert torch.equal(inside, SamplingPlan(model, steps=2, dtype=torch.bfloat16)(eva, noise))


def test_simple_scale_factor_is_undone(make_model, draw):
    model, scaled = make_model(), make_model(simple_scale_factor=4.0)
    eva, noise = draw(model)
    one, four = (SamplingPlan(m, steps=2)(eva, noise) for m in (model, scaled))
    assert torch.equal(one, 4 * four)


def test_sampling_neither_drops_units_nor_changes_the_mode(make_model, draw):
    model = make_model(dropout_prob=0.5, attention_dropout=0.5, eva_adapter_dropout=0.5)
    eva, noise = draw(model)
    expected = SamplingPlan(model, steps=2)(eva, noise)
    model.train()
    assert torch.equal(SamplingPlan(model, steps=2)(eva, noise), expected)
    assert all(module.training for module in model.modules() if module is not model.rotary)


def test_inputs_are_left_alone(model, draw):
    eva, noise = draw(model)
    copies = eva.clone(), noise.clone()
    SamplingPlan(model, steps=2)(eva, noise)
    assert torch.equal(eva, copies[0]) and torch.equal(noise, copies[1])


def test_runs_are_repeatable(model, draw):
    eva, noise = draw(model, 3)
    plan = SamplingPlan(model, steps=3)
    assert torch.equal(plan(eva, noise), plan(eva, noise))


@pytest.mark.parametrize("conventions", ["consistent", "published"])
def test_interpreted_kernels(make_model, draw, device, conventions):
    """The Triton kernels inside the plan, on the CPU in Triton's interpreter."""
    model = make_model(conventions=conventions, num_hidden_layers=1)
    eva, noise = draw(model, 1)
    truth = plain(model.double(), eva.double(), noise.double(), "euler")
    model.float().to(device)
    plan = SamplingPlan(
        model, steps=2, solver="euler", time_grid=UNEVEN, impl=Impl.TRITON, graph=False
    )
    got = plan(eva.to(device), noise).cpu()
    same = plain(model.cpu(), eva, noise, "euler")
    judge("sample", got, same, truth, roundings_of(model.config, 2))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled(backend, make_model, draw, monkeypatch):
    """The quick one traces all that the compiler would fuse."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    model = make_model(num_hidden_layers=1)
    eva, noise = draw(model)
    expected = SamplingPlan(model, steps=2, solver="euler")(eva, noise)
    compiled = SamplingPlan(model, steps=2, solver="euler", compile=True)(eva, noise)
    assert relative_error(compiled, expected) < limit(model)


def test_a_cls_token_that_the_model_has_not_is_left_out(make_model, draw):
    plan = SamplingPlan(make_model(), steps=2)
    eva, noise = draw(plan.model)
    longer = torch.cat((torch.full_like(eva[:, :1], 9.0), eva), dim=1)
    assert torch.equal(plan(longer, noise), plan(eva, noise))
    with pytest.raises(ValueError, match="eva_features: expected shape"):
        plan(torch.cat((longer, eva[:, :1]), dim=1), noise)
