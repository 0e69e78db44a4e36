import dataclasses
import json

import numpy as np
import pytest

from blip3o_fast.evaluation import Photo, SampleScores, spread_samples, token_map


def test_best_is_the_highest_token_cosine(report):
    values = [result.metrics.token_cosine.value for result in report.dit]
    assert report.best is report.dit[int(np.argmax(values))]
    assert report.best.evaluations == 1


def test_to_dict_holds_every_result(report):
    record = report.to_dict()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["format_version"] == 1
    assert record["ridge"] == report.ridge.metrics.to_dict()
    assert record["mean_predictor"]["r2"]["value"] == 0
    assert [entry["evaluations"] for entry in record["dit"]] == [1, 2, 3, 10, 100]
    assert record["dit"][3]["mse"]["value"] == report.dit[3].metrics.mse.value
    assert record["best_evaluations"] == 1
    assert record["verdict"]["sentence"] == report.verdict.sentence
    assert record["history"][1] == [2, 1.0]
    assert record["photos"][0]["cosines"] == report.photos[0].cosines.tolist()


def test_the_verdict_follows_the_results(make_report):
    assert make_report(best_noise=0.3).verdict.beats_ridge
    assert not make_report(best_noise=0.9).verdict.beats_ridge


def test_token_map_is_row_major_and_averages_depth():
    values = np.arange(12.0)
    np.testing.assert_array_equal(token_map(values, (1, 3, 4)), values.reshape(3, 4))
    np.testing.assert_array_equal(token_map(values, (2, 2, 3)), [[3, 4, 5], [6, 7, 8]])
    with pytest.raises(ValueError, match=r"one per patch of grid \(1, 4, 4\), got \[12\]"):
        token_map(values, (1, 4, 4))


def test_spread_samples_run_from_worst_to_best():
    values = np.array([0.5, 0.1, 0.9, 0.3, 0.7])
    scores = SampleScores(tuple("abcde"), tuple("abcde"), values, values, values, values)
    assert spread_samples(scores, 3) == (1, 0, 2)
    assert spread_samples(scores, 9) == (1, 3, 0, 4, 2)
    assert spread_samples(scores, 1) == (1,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: {"dit": ()}, r"dit: expected results with evaluations >= 1, got \[\]"),
        (lambda r: {"dit": (r.ridge,)}, r"evaluations >= 1, got \[None\]"),
        (lambda r: {"dit": r.dit[::-1]}, "rising numbers of evaluations, got"),
        (lambda r: {"dit": (r.dit[0], r.dit[0])}, r"rising numbers of evaluations, got \[1, 1\]"),
        (lambda r: {"grid": (1, 4, 5)}, r"grid: expected 16 patches, got \(1, 4, 5\)"),
        (
            lambda r: {"photos": (Photo("nobody", np.zeros((4, 4))),)},
            "photos: expected evaluated samples, got 'nobody'",
        ),
        (
            lambda r: {"photos": (Photo(r.photos[0].key, np.zeros(16)),)},
            "photos: expected maps of 4 x 4",
        ),
        (
            lambda r: {"photos": (Photo(r.photos[0].key, np.zeros((4, 4)), np.zeros((8, 8, 3))),)},
            "photos: expected uint8 images",
        ),
    ],
)
def test_inconsistent_reports_are_refused(report, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(report, **change(report))


def test_results_of_other_samples_are_refused(report):
    keys = report.ridge.scores.keys[::-1]
    scores = dataclasses.replace(report.ridge.scores, keys=keys)
    ridge = dataclasses.replace(report.ridge, scores=scores)
    with pytest.raises(ValueError, match="every method on the same samples in the same order"):
        dataclasses.replace(report, ridge=ridge)
