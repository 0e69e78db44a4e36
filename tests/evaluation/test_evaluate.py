"""From a model and shards to a report."""

import numpy as np
import pytest
import torch
from small_data import C, small_model, write_shards

from blip3o_fast.data import EmbeddingDataset
from blip3o_fast.evaluation import EvaluationSettings, evaluate_model, token_cosines
from blip3o_fast.evaluation.evaluate import chosen, translate
from blip3o_fast.flow import find_solver
from blip3o_fast.sampling import fit_solvers


@pytest.fixture
def sides(tmp_path):
    folder = write_shards(tmp_path / "shards", 40, photos=20)
    return tuple(EmbeddingDataset(folder, split=side) for side in ("train", "heldout"))


def run(model, sides, **settings):
    plain = {"evaluations": (1, 2, 5), "bootstrap": 50, "photos": 2}
    settings = EvaluationSettings(**{**plain, **settings})
    return evaluate_model(model, *sides, settings, progress=False)


def test_report_holds_what_the_model_generates(sides):
    model, heldout = small_model(), sides[1]
    report = run(model, sides)
    batch = heldout.read(range(len(heldout)))
    settings = EvaluationSettings(evaluations=(1, 2, 5))
    for result in report.dit:
        generated = translate(model, batch, settings, result.evaluations)
        expected = token_cosines(generated, batch.clip).mean().item()
        assert result.metrics.token_cosine.value == pytest.approx(expected, abs=1e-5)
    assert report.ridge.metrics.token_cosine.value > report.mean.metrics.token_cosine.value


def test_batch_size_changes_nothing(sides):
    reports = [run(small_model(), sides, batch_size=size) for size in (1, 7, 64)]
    for report in reports[1:]:
        for a, b in zip(reports[0].dit, report.dit, strict=True):
            assert a.scores.keys == b.scores.keys
            np.testing.assert_allclose(a.scores.mse, b.scores.mse, rtol=1e-4)


@pytest.mark.parametrize(
    ("solver", "evaluations", "method"),
    [
        ("heun", 1, ("euler", 1)),
        ("heun", 2, ("heun", 1)),
        ("heun", 25, ("euler", 25)),
        ("heun", 100, ("heun", 50)),
        ("euler", 4, ("euler", 4)),
        ("adams_bashforth2", 10, ("adams_bashforth2", 10)),
    ],
)
def test_evaluations_are_spent_as_said(solver, evaluations, method):
    assert EvaluationSettings(solver=solver).method(evaluations) == method


@pytest.mark.parametrize("evaluations", [1, 4, 5, 10])
def test_so_many_evaluations_of_the_network(evaluations):
    """Counted as stages: the solver's per step, times the steps."""
    solver, steps = EvaluationSettings().method(evaluations)
    assert find_solver(solver).evaluations_per_step * steps == evaluations


def test_samples_are_spread_evenly(sides):
    data = sides[0]
    assert list(chosen(data, None)) == list(range(len(data)))
    few = chosen(data, 3)
    assert few[0] == 0 and few[-1] == len(data) - 1 and len(few) == 3
    with pytest.raises(ValueError, match="max_samples: expected at least 1, got 0"):
        chosen(data, 0)


def test_maps_and_crops_of_the_shown_samples(sides):
    crop = np.zeros((8, 12, 3), np.uint8)
    report = evaluate_model(
        small_model(),
        *sides,
        EvaluationSettings(evaluations=(1,), bootstrap=0, photos=3),
        image_of=lambda record: crop,
        progress=False,
    )
    assert len(report.photos) == 3 and report.photos[0].image is crop
    scores = dict(zip(report.best.scores.keys, report.best.scores.token_cosine, strict=True))
    for photo in report.photos:
        assert photo.cosines.shape == (2, 3)
        assert photo.cosines.mean() == pytest.approx(scores[photo.key], abs=1e-5)


def test_data_of_another_size_is_named(sides):
    with pytest.raises(ValueError, match=rf"expected .* \(6, 10, {C + 1}\), those of the model"):
        run(small_model(clip_embedding_size=C + 1), sides)


def test_scale_is_undone(sides):
    """A model of half-size targets, told so, answers in full size."""
    plain, scaled = small_model(), small_model(simple_scale_factor=0.5)
    batch = sides[1].read([0, 1])
    settings = EvaluationSettings()
    torch.testing.assert_close(
        translate(scaled, batch, settings, 1), 2 * translate(plain, batch, settings, 1)
    )


def test_fitted_solvers_are_measured_beside_the_others(sides):
    model = small_model()
    eva = sides[0].read(range(8)).eva
    model.fitted = fit_solvers(
        model, eva, evaluations=(2, 3), generator=torch.Generator().manual_seed(0)
    )
    report = run(model, sides)
    assert [result.evaluations for result in report.fitted] == [2, 3]
    batch = sides[1].read(range(len(sides[1])))
    for result in report.fitted:
        solver = model.fitted[result.evaluations]
        generated = translate(model, batch, EvaluationSettings(), len(solver), solver)
        expected = token_cosines(generated, batch.clip).mean().item()
        assert result.metrics.token_cosine.value == pytest.approx(expected, abs=1e-5)
        assert result.solver_error == solver.error
    assert "fitted_2" in dict(report.methods)
    assert run(model, sides, guidance_scale=2.0).fitted == ()
    assert run(model, sides, time_grid="published").fitted == ()


def test_regression_is_one_more_baseline(sides):
    other = small_model(seed=3)
    settings = EvaluationSettings(evaluations=(2,), bootstrap=0, photos=0)
    report = evaluate_model(small_model(), *sides, settings, regression=other, progress=False)
    expected = evaluate_model(
        other,
        *sides,
        EvaluationSettings(evaluations=(1,), bootstrap=0, photos=0),
        progress=False,
    )
    assert report.regression.metrics == expected.dit[0].metrics
    assert report.to_dict()["regression"]["token_cosine"] == pytest.approx(
        expected.to_dict()["dit"][0]["token_cosine"]
    )


@pytest.mark.parametrize("fields", [{"evaluations": ()}, {"evaluations": (0,)}, {"batch_size": 0}])
def test_bad_settings(fields):
    with pytest.raises(ValueError, match="expected"):
        EvaluationSettings(**fields)
