"""Percentile bootstrap intervals that resample photos, not crops.

Crops of one photo are not independent, so the unit that is drawn with replacement is the cluster
(the source photo), with all of its samples. A mean over samples is a ratio of two resampled sums,

    mean_r = sum_g w_rg * S_g / sum_g w_rg * n_g        S_g = sum of the values in cluster g,

where ``w_r`` counts how often replicate r drew each of the G clusters (G draws). The interval is
the central part of the replicates' distribution (Efron and Tibshirani, 1993, chapter 13). It is a
little too narrow when there are fewer than about twenty clusters.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value and the ends of its interval; the ends are None where no interval was computed."""

    value: float
    low: float | None = None
    high: float | None = None


def cluster_index(labels: Sequence[str]) -> NDArray[np.int64]:
    """Number the distinct labels 0, 1, ... in order of first appearance: one number per sample."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(label, len(numbers)) for label in labels], dtype=np.int64)


def resampled_sums(
    values: FloatArray, clusters: NDArray[np.int64], *, replicates: int, seed: int
) -> FloatArray:
    """Sums of the columns of ``values`` over resampled clusters.

    Args:
        values: ``[n, K]``, one row per sample.
        clusters: ``[n]``, the cluster of each sample, numbered from 0 without gaps.
        replicates: how many resamples R.
        seed: of the draws; the same seed draws the same clusters whatever ``values`` holds.

    Returns:
        ``[R, K]``.
    """
    count = int(clusters.max()) + 1
    sums = np.zeros((count, values.shape[1]))
    np.add.at(sums, clusters, values)
    rng = np.random.default_rng(seed)
    out = np.empty((replicates, values.shape[1]))
    for r in range(replicates):
        out[r] = np.bincount(rng.integers(count, size=count), minlength=count) @ sums
    return out


def percentile_interval(replicates: FloatArray, confidence: float) -> tuple[float, float]:
    """The central ``confidence`` part of the replicated statistics ``[R]``."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(replicates, (tail, 1 - tail))
    return float(low), float(high)


def estimate_means(
    columns: dict[str, FloatArray],
    labels: Sequence[str],
    *,
    replicates: int,
    confidence: float,
    seed: int,
) -> dict[str, Estimate]:
    """The mean of each column with its interval.

    Args:
        columns: name to per-sample values ``[n]``.
        labels: the cluster (source photo) of each sample.
        replicates: 0 leaves the intervals out, as does a single cluster.
        confidence: of the interval, in (0, 1).
        seed: of the draws.
    """
    check_settings(replicates, confidence)
    names = list(columns)
    values = np.stack([np.ones(len(labels)), *columns.values()], axis=1)
    means = values[:, 1:].mean(0)
    clusters = cluster_index(labels)
    if replicates == 0 or clusters.max() == 0:
        return {name: Estimate(float(mean)) for name, mean in zip(names, means, strict=True)}
    sums = resampled_sums(values, clusters, replicates=replicates, seed=seed)
    draws = sums[:, 1:] / sums[:, :1]
    return {
        name: Estimate(float(means[k]), *percentile_interval(draws[:, k], confidence))
        for k, name in enumerate(names)
    }


def estimate_ratio(
    numerator: FloatArray,
    denominator: FloatArray,
    labels: Sequence[str],
    *,
    replicates: int,
    confidence: float,
    seed: int,
) -> Estimate:
    """``sum(numerator) / sum(denominator)`` over samples, with its interval."""
    check_settings(replicates, confidence)
    value = float(numerator.sum() / denominator.sum())
    clusters = cluster_index(labels)
    if replicates == 0 or clusters.max() == 0:
        return Estimate(value)
    sums = resampled_sums(
        np.stack((numerator, denominator), axis=1), clusters, replicates=replicates, seed=seed
    )
    return Estimate(value, *percentile_interval(sums[:, 0] / sums[:, 1], confidence))


def check_settings(replicates: int, confidence: float) -> None:
    """Raise ``ValueError`` unless the bootstrap can run with these settings."""
    if replicates < 0:
        raise ValueError(f"bootstrap: expected 0 or more resamples, got {replicates}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a number between 0 and 1, got {confidence}")
