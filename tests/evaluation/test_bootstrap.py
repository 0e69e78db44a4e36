import numpy as np
import pytest

from blip3o_fast.evaluation.bootstrap import (
    cluster_index,
    estimate_means,
    estimate_ratio,
    percentile_interval,
    resampled_sums,
)

SETTINGS = {"replicates": 300, "confidence": 0.95, "seed": 0}


def clustered(rng, photos=40, crops=5, photo_scale=1.0, crop_scale=0.5):
    values = np.repeat(photo_scale * rng.standard_normal(photos), crops)
    values += crop_scale * rng.standard_normal(photos * crops)
    return values, [f"photo{i // crops}" for i in range(photos * crops)]


def test_clusters_are_numbered_by_first_appearance():
    assert cluster_index(["b", "a", "b", "c"]).tolist() == [0, 1, 0, 2]


def test_resampled_sums_are_sums_over_drawn_clusters():
    rng = np.random.default_rng(3)
    values = rng.standard_normal((12, 2))
    clusters = np.array([0, 1, 2, 0, 1, 2, 3, 3, 3, 3, 0, 1])
    got = resampled_sums(values, clusters, replicates=7, seed=11)
    draws = np.random.default_rng(11)
    for row in got:
        picked = draws.integers(4, size=4)
        expected = sum(values[clusters == c].sum(0) for c in picked)
        np.testing.assert_allclose(row, expected, rtol=1e-12)


def test_percentile_interval_is_the_central_part():
    low, high = percentile_interval(np.arange(1001.0), 0.9)
    assert (low, high) == pytest.approx((50, 950))


def test_interval_covers_the_truth_of_clustered_data():
    """95 % intervals over photos cover about 95 %; over crops, as if independent, far less."""
    rng = np.random.default_rng(0)
    covered = {"photos": 0, "crops": 0}
    repeats = 500
    for i in range(repeats):
        values, photos = clustered(rng, photos=60)
        for unit, labels in (("photos", photos), ("crops", [str(j) for j in range(len(values))])):
            settings = {"replicates": 200, "confidence": 0.95, "seed": i}
            estimate = estimate_means({"x": values}, labels, **settings)["x"]
            covered[unit] += estimate.low <= 0 <= estimate.high
    assert 0.90 <= covered["photos"] / repeats <= 0.98
    assert covered["crops"] / repeats < 0.75


def test_ratio_interval_covers_the_truth():
    rng = np.random.default_rng(1)
    covered, repeats = 0, 250
    for i in range(repeats):
        scale, photos = clustered(rng, photo_scale=0.3, crop_scale=0.1)
        denominator = np.exp(scale)
        numerator = denominator * (0.4 + 0.1 * rng.standard_normal(len(scale)))
        settings = {"replicates": 250, "confidence": 0.95, "seed": i}
        estimate = estimate_ratio(numerator, denominator, photos, **settings)
        covered += estimate.low <= 0.4 <= estimate.high
    assert 0.90 <= covered / repeats <= 0.98


def test_point_estimates_and_repeatability():
    values, photos = clustered(np.random.default_rng(2))
    other = values**2 + 1
    got = estimate_means({"a": values, "b": other}, photos, **SETTINGS)
    assert got["a"].value == pytest.approx(values.mean())
    assert got["b"].value == pytest.approx(other.mean())
    assert got["a"].low < got["a"].value < got["a"].high
    assert got == estimate_means({"a": values, "b": other}, photos, **SETTINGS)
    assert got["a"] != estimate_means({"a": values}, photos, **{**SETTINGS, "seed": 1})["a"]
    ratio = estimate_ratio(values, other, photos, **SETTINGS)
    assert ratio.value == pytest.approx(values.sum() / other.sum())


@pytest.mark.parametrize(("replicates", "label"), [(0, None), (100, "same")])
def test_no_interval_without_resamples_or_from_a_single_photo(replicates, label):
    values = np.arange(6.0)
    labels = [label or str(i) for i in range(6)]
    settings = {"replicates": replicates, "confidence": 0.95, "seed": 0}
    estimate = estimate_means({"x": values}, labels, **settings)["x"]
    ratio = estimate_ratio(values, values + 1, labels, **settings)
    assert (estimate.value, estimate.low, estimate.high) == (2.5, None, None)
    assert (ratio.low, ratio.high) == (None, None)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"replicates": -1}, "bootstrap: expected 0 or more"),
        ({"confidence": 95}, "between 0 and 1"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        estimate_means({"x": np.ones(3)}, ["a", "b", "c"], **{**SETTINGS, **wrong})
