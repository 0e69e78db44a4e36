"""Fitted solvers: nearer to the reference than any other, on conditions they never saw."""

import itertools
import json

import pytest
import torch
from golden_data import relative_error
from rounding import rounding_bound, roundings_of

from blip3o_fast import BLIP3oDiT, FittedSolver, SamplingPlan, fit_solver
from blip3o_fast.flow import load_solvers
from blip3o_fast.sampling import fit_solvers
from blip3o_fast.sampling.fit import default_reference, solver_errors, warped_nodes


def conditions(count, seed=3):
    return torch.randn(count, 6, 12, generator=torch.Generator().manual_seed(seed))


def seeded():
    return torch.Generator().manual_seed(1)


@pytest.fixture(scope="module", params=["consistent", "published"])
def fitted(request):
    from tests.sampling.conftest import build

    model = build(conventions=request.param)
    with torch.no_grad():
        for p in model.parameters():
            p *= 0.8  # a velocity smooth enough for solvers to differ by their order
    return model, fit_solvers(model, conditions(12), evaluations=(2, 4, 6), generator=seeded())


def test_beats_every_other_solver(fitted):
    model, solvers = fitted
    plans = {count: SamplingPlan(model, solver=solver) for count, solver in solvers.items()}
    for count in solvers:
        for name, stages in (("heun", 2), ("midpoint", 2), ("adams_bashforth2", 1), ("euler", 1)):
            plans[name, count] = SamplingPlan(model, steps=count // stages, solver=name)
    reference = default_reference(model, 1.0)
    errors = solver_errors(plans, reference, conditions(8, seed=9), seeded())
    for count, solver in solvers.items():
        others = [e for key, e in errors.items() if isinstance(key, tuple) and key[1] == count]
        assert len(others) == 4 and errors[count] < 0.7 * min(others)
        assert errors[count] < 3 * solver.error, "the stored error misleads"
    assert errors[6] < errors[2]


def test_coefficients_reproduce_the_loop(fitted):
    """x_{n+1} = a_n x_n + sum_j c_nj v_j, written out by hand."""
    model, solvers = fitted
    solver, eva = solvers[4], conditions(2, seed=5)
    noise = torch.randn(2, 6, 10, generator=seeded())
    trajectory = SamplingPlan(model, solver=solver).start(eva, noise.clone())
    x, slopes = noise.clone(), []
    for n in range(4):
        trajectory.x.copy_(x)
        trajectory.row.fill_(n)
        slopes.append(trajectory.guided_slope())
        x = solver.states[n] * x + sum(c * v for c, v in zip(solver.slopes[n], slopes, strict=True))
    got = SamplingPlan(model, solver=solver)(eva, noise)
    assert relative_error(got, x) < 1e-5


def test_a_linear_velocity_is_solved_exactly(make_model):
    """With as many unknowns as needed the fit is exact: v depends on the time alone."""
    model = make_model(zero_init_output=True, conventions="published")
    torch.nn.init.zeros_(model.output_proj.weight)
    solver = fit_solver(model, conditions(4), evaluations=2, generator=seeded())
    assert solver.error < 1e-6


def test_is_saved_beside_the_model_and_found_by_name(fitted, tmp_path):
    model, solvers = fitted
    model.save_pretrained(tmp_path)
    for solver in solvers.values():
        solver.save(tmp_path)
    assert load_solvers(tmp_path) == solvers
    assert FittedSolver.load(tmp_path, 4) == solvers[4]
    loaded = BLIP3oDiT.from_pretrained(tmp_path)
    eva, noise = conditions(2), torch.randn(2, 6, 10, generator=seeded())
    got = loaded.generate(eva, 4, solver="fitted", noise=noise)
    assert torch.equal(got, SamplingPlan(model, solver=solvers[4])(eva, noise))
    loaded.save_pretrained(tmp_path / "again")
    assert load_solvers(tmp_path / "again") == solvers
    narrow = BLIP3oDiT.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert narrow.generate(eva, 4, solver="fitted", noise=noise).isfinite().all()
    with pytest.raises(ValueError, match=r"of 5 evaluations, the model has those of 2, 4, 6"):
        loaded.generate(eva, 5, solver="fitted")


def test_is_refused_for_anything_else(fitted, make_model):
    model, solvers = fitted
    eva, noise = conditions(2), torch.randn(2, 6, 10, generator=seeded())
    other = make_model(conventions=model.config.conventions)
    with pytest.raises(ValueError, match=r"fitted for weights \w{12}, got a plan with \w{12}; fit"):
        SamplingPlan(other, solver=solvers[2])(eva, noise)
    with pytest.raises(ValueError, match=r"fitted for guidance_scale 1, got a plan with 2; fit"):
        SamplingPlan(model, solver=solvers[2], guidance_scale=2.0)(eva, noise)
    with pytest.raises(ValueError, match="expected None for a fitted solver of 2 evaluations"):
        SamplingPlan(model, steps=3, solver=solvers[2])


def test_guidance_is_fitted(make_model):
    model = make_model()
    solver = fit_solver(model, conditions(8), evaluations=4, guidance_scale=2.0, generator=seeded())
    plans = {
        "fitted": SamplingPlan(model, solver=solver, guidance_scale=2.0),
        "heun": SamplingPlan(model, steps=2, guidance_scale=2.0),
    }
    errors = solver_errors(plans, default_reference(model, 2.0), conditions(4, 9), seeded())
    assert errors["fitted"] < 0.5 * errors["heun"]


def test_a_sample_depends_on_itself_alone(fitted):
    model, solvers = fitted
    plan, eva, seeds = (
        SamplingPlan(model, solver=solvers[6]),
        conditions(5, seed=7),
        [7, 3, 11, 3, 9],
    )
    together = plan(eva, seeds=seeds)
    assert torch.equal(plan(eva, seeds=seeds), together)
    alone = torch.cat([plan(eva[i : i + 1], seeds=[seeds[i]]) for i in range(5)])
    small = SamplingPlan(model, solver=solvers[6], working_memory=1)(eva, seeds=seeds)
    bound = rounding_bound(torch.float32, roundings_of(model.config, 6))
    assert relative_error(alone, together) < bound and relative_error(small, together) < bound


def test_fits_are_repeatable(make_model):
    model = make_model()
    first, second = (
        fit_solver(model, conditions(4), evaluations=2, generator=seeded()) for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize("warp", [1.0, 1.5, 4.0])
@pytest.mark.parametrize("count", [1, 3, 50])
def test_nodes_increase_from_end_to_end(count, warp):
    nodes = warped_nodes(50, count, warp)
    assert nodes[0] == 0 and nodes[-1] == 50 and len(nodes) == count + 1
    assert all(a < b for a, b in itertools.pairwise(nodes))


def test_the_grid_of_the_reference_is_a_choice(make_model):
    model = make_model()
    times = torch.linspace(0, 1, 65).square().tolist()
    named = fit_solver(model, conditions(4), evaluations=2, time_grid=times, generator=seeded())
    plan = SamplingPlan(model, steps=64, solver="midpoint", time_grid=times)
    given = fit_solver(model, conditions(4), evaluations=2, reference=plan, generator=seeded())
    assert named == given and named.reference == "128 evaluations"
    assert set(named.labels) <= set(times)
    with pytest.raises(ValueError, match="time_grid: expected None beside a reference"):
        fit_solver(model, conditions(4), evaluations=2, reference=plan, time_grid=times)


def test_a_model_that_diverges_is_an_error(make_model):
    model = make_model(conventions="consistent")
    with torch.no_grad():
        model.output_proj.weight.mul_(torch.inf)
    with pytest.raises(ValueError, match="expected finite samples, got NaN or Inf in 0, 1"):
        fit_solver(model, conditions(4), evaluations=2, generator=seeded())


def test_bad_requests(make_model):
    model = make_model()
    with pytest.raises(ValueError, match="eva: expected at least 4 conditions, got 3"):
        fit_solver(model, conditions(3), evaluations=2)
    with pytest.raises(ValueError, match="evaluations: expected at most the 128 steps"):
        fit_solver(model, conditions(4), evaluations=200)
    with pytest.raises(ValueError, match="evaluations: expected numbers of at least 1"):
        fit_solver(model, conditions(4), evaluations=0)


@pytest.mark.parametrize(
    "content",
    ["[]", "{", '{"format_version": 2, "solvers": []}', '{"format_version": 1, "solvers": [{}]}'],
)
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "solver.json").write_text(content)
    with pytest.raises(ValueError, match=r"solver\.json: expected"):
        load_solvers(tmp_path)


def test_numbers_in_the_file_are_checked(fitted, tmp_path):
    _, solvers = fitted
    solvers[2].save(tmp_path)
    path = tmp_path / "solver.json"
    content = json.loads(path.read_text())
    content["solvers"][0]["slopes"][1] = [1.0]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="expected 2 slopes in row 1, got 1"):
        load_solvers(tmp_path)
    content["solvers"][0]["slopes"][1] = [1.0, 2.0]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="values that were changed since; fit it again"):
        load_solvers(tmp_path)
