import numpy as np
import pytest

from blip3o_fast.evaluation import similarity
from blip3o_fast.evaluation.similarity import (
    energy_distance,
    linear_cka,
    linear_cka_debiased,
    retrieval_hits,
)


def brute_force_hits(queries, gallery, k):
    """Sort every query's cosines; no ties in random data."""
    hits = []
    for i, query in enumerate(queries):
        cosines = gallery @ query / np.linalg.norm(gallery, axis=1) / np.linalg.norm(query)
        hits.append(i in np.argsort(-cosines)[:k])
    return np.array(hits, dtype=float)


@pytest.mark.parametrize("rows", [7, 1024])
def test_retrieval_equals_sorting(monkeypatch, rows):
    monkeypatch.setattr(similarity, "_ROWS", rows)
    rng = np.random.default_rng(0)
    target = rng.standard_normal((50, 6))
    generated = 3 * target + 2.5 * rng.standard_normal((50, 6))
    forward, backward = retrieval_hits(generated, target, (1, 5, 10))
    for i, k in enumerate((1, 5, 10)):
        np.testing.assert_array_equal(forward[:, i], brute_force_hits(generated, target, k))
        np.testing.assert_array_equal(backward[:, i], brute_force_hits(target, generated, k))
    assert 0.1 < forward[:, 0].mean() < 0.9
    assert (forward != backward).any()


@pytest.mark.parametrize("constant", [0.0, 2.0])
def test_a_constant_prediction_scores_chance(constant):
    target = np.random.default_rng(1).standard_normal((40, 5))
    generated = np.full((40, 5), constant)
    forward, backward = retrieval_hits(generated, target, (1, 5, 100))
    np.testing.assert_allclose(backward.mean(0), (1 / 40, 5 / 40, 1))
    np.testing.assert_allclose(forward.mean(0), (1 / 40, 5 / 40, 1))


def test_duplicates_share_the_hit():
    vectors = np.eye(4)[[0, 0, 1, 2]]
    forward, _ = retrieval_hits(vectors, vectors, (1,))
    np.testing.assert_allclose(forward[:, 0], (0.5, 0.5, 1, 1))


@pytest.mark.parametrize("rows", [7, 1024])
def test_energy_distance_equals_the_sum_over_pairs(monkeypatch, rows):
    monkeypatch.setattr(similarity, "_ROWS", rows)
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((20, 3)), 2 * rng.standard_normal((20, 3)) + 1
    pairs = [(i, j) for i in range(20) for j in range(20) if i != j]

    def mean(a, b):
        return np.mean([np.linalg.norm(a[i] - b[j]) for i, j in pairs])

    expected = 1 - (mean(x, x) + mean(y, y)) / (2 * mean(x, y))
    assert energy_distance(x, y) == pytest.approx(expected, rel=1e-12)


def test_energy_distance_of_known_distributions():
    rng = np.random.default_rng(4)
    x, y = rng.standard_normal((2, 2000, 8))
    assert abs(energy_distance(x, y)) < 0.002
    assert energy_distance(x, y + 1) > 0.05
    # A point against a Gaussian: 1 - E|y - y'| / (2 E|y|) = 1 - 1 / sqrt(2).
    assert energy_distance(np.zeros_like(y), y) == pytest.approx(1 - 0.5**0.5, abs=0.005)
    assert energy_distance(np.zeros((5, 2)), np.ones((5, 2))) == 1
    assert energy_distance(np.ones((5, 2)), np.ones((5, 2))) == 0
    assert energy_distance(x[:1], y[:1]) is None


def centring(n):
    return np.eye(n) - 1 / n


def test_cka_equals_the_kernel_formula():
    rng = np.random.default_rng(2)
    x = rng.standard_normal((30, 7)) + 4
    y = x[:, :3] @ rng.standard_normal((3, 5)) + rng.standard_normal((30, 5))
    h = centring(30)
    k, m = h @ x @ x.T @ h, h @ y @ y.T @ h
    expected = (k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum())
    assert linear_cka(x, y) == pytest.approx(expected, rel=1e-12)


def unbiased_hsic(k, m):
    """Song et al. (2012), equation 5, with explicit sums over distinct indices."""
    n = len(k)
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    one = np.ones(n)
    value = np.trace(k @ m)
    value += (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    value -= 2 / (n - 2) * (one @ k @ m @ one)
    return value / (n * (n - 3))


def test_debiased_cka_equals_the_kernel_formula():
    rng = np.random.default_rng(3)
    x = rng.standard_normal((20, 9)) + 2
    y = x[:, :4] + 0.5 * rng.standard_normal((20, 4))
    k, m = x @ x.T, y @ y.T
    expected = unbiased_hsic(k, m) / np.sqrt(unbiased_hsic(k, k) * unbiased_hsic(m, m))
    assert linear_cka_debiased(x, y) == pytest.approx(expected, rel=1e-9)


def test_cka_ignores_rotation_scale_and_shift():
    rng = np.random.default_rng(4)
    x = rng.standard_normal((60, 8)) * np.arange(1, 9)
    rotation, _ = np.linalg.qr(rng.standard_normal((8, 8)))
    y = 3 * x @ rotation - 5
    assert linear_cka(x, y) == pytest.approx(1, abs=1e-12)
    assert linear_cka_debiased(x, y) == pytest.approx(1, abs=1e-12)


def test_only_the_plain_form_is_biased():
    """Independent Gaussians in many dimensions: the plain value is high, the debiased near 0."""
    rng = np.random.default_rng(5)
    pairs = [rng.standard_normal((2, 40, 200)) for _ in range(20)]
    assert np.mean([linear_cka(x, y) for x, y in pairs]) > 0.7
    debiased = [linear_cka_debiased(x, y) for x, y in pairs]
    assert abs(np.mean([value for value in debiased if value is not None])) < 0.02


def test_degenerate_input():
    rng = np.random.default_rng(6)
    y = rng.standard_normal((10, 3))
    constant = np.full((10, 3), 5.0)
    constant += 1e-7 * rng.standard_normal((10, 3))
    assert linear_cka(constant, y) == 0
    assert linear_cka_debiased(y, constant) == 0
    assert linear_cka_debiased(y[:3], y[:3]) is None
    assert linear_cka(y[:1], y[:1]) is None
