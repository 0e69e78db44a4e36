"""Comparisons of two sets of vectors ``[n, C]``: retrieval, linear CKA and energy distance.

All need the n vectors at once, which is why the accumulator keeps one or two vectors a sample.
"""

import numpy as np
from numpy.typing import NDArray

from blip3o_fast.evaluation.bootstrap import FloatArray

_TIE = 1e-9  # cosines of identical vectors differ by rounding that depends on the GEMM's blocking
_ROWS = 1024  # rows of the n x n similarity matrix held at a time
_CONSTANT = 1e-10  # share of the sum of squares below which variation is rounding


def retrieval_hits(
    generated: FloatArray, target: FloatArray, ks: tuple[int, ...]
) -> tuple[FloatArray, FloatArray]:
    """Whether each vector's own partner is among its k nearest by cosine, searching both ways.

    A partner that ties with others is counted with the probability that a random order of the tied
    would put it in the first k, so that a constant prediction scores chance, k / n, and not 0 or 1.

    Args:
        generated, target: ``[n, C]``; row i of one belongs to row i of the other.
        ks: list lengths.

    Returns:
        generated-to-target and target-to-generated hits, ``[n, len(ks)]`` in [0, 1].
    """
    n = len(generated)
    a, b = _unit(generated), _unit(target)
    partner = np.einsum("nc,nc->n", a, b)
    better, tied = np.zeros((2, n)), np.zeros((2, n))
    for start in range(0, n, _ROWS):
        rows = slice(start, start + _ROWS)
        cosines = a[rows] @ b.T
        for way, own in enumerate((partner[rows, None], partner[None])):
            above = cosines > own + _TIE
            level = np.abs(cosines - own) <= _TIE
            if way == 0:
                better[0, rows], tied[0, rows] = above.sum(1), level.sum(1)
            else:
                better[1] += above.sum(0)
                tied[1] += level.sum(0)
    lengths = np.array(ks)[None, None]
    hits = np.clip((lengths - better[..., None]) / tied[..., None], 0, 1)
    return hits[0], hits[1]


def linear_cka(x: FloatArray, y: FloatArray) -> float | None:
    """Linear centred kernel alignment of ``[n, P]`` and ``[n, Q]``, in [0, 1] (arXiv:1905.00414).

    ``|Y' X|^2 / (|X' X| |Y' Y|)`` with centred columns and Frobenius norms. 1 means equal up to
    rotation, isotropic scale and shift. Biased upwards when n is not much larger than P and Q. A
    constant ``x`` or ``y`` has nothing to align and gives 0. None for a single row.
    """
    if len(x) < 2:
        return None
    if _is_constant(x) or _is_constant(y):
        return 0.0
    x, y = x - x.mean(0), y - y.mean(0)
    own = np.linalg.norm(_gram(x)) * np.linalg.norm(_gram(y))
    return float(np.square(x.T @ y).sum() / own)


def linear_cka_debiased(x: FloatArray, y: FloatArray) -> float | None:
    """Linear CKA from unbiased estimates of HSIC (Song et al., 2012; arXiv:2010.15327).

    Near 0 for independent sets at any n, and so at times slightly negative. None where the estimate
    does not exist: below four samples. Constant input gives 0.
    """
    if len(x) < 4:
        return None
    if _is_constant(x) or _is_constant(y):
        return 0.0
    x, y = x - x.mean(0), y - y.mean(0)
    own = _unbiased_hsic(x, x) * _unbiased_hsic(y, y)
    return float(_unbiased_hsic(x, y) / np.sqrt(own)) if own > 0 else None


def energy_distance(x: FloatArray, y: FloatArray) -> float | None:
    """How far two distributions are apart, from ``[n, C]`` each (Szekely and Rizzo, 2013).

    ``1 - (E|x - x'| + E|y - y'|) / (2 E|x - y'|)`` with Euclidean norms over pairs of different
    rows: 0 for equal distributions, give or take the noise of n rows, 1 for constants that differ.
    Row i of one may depend on row i of the other. None for a single row.
    """
    if len(x) < 2:
        return None
    across = _mean_distance(x, y)
    if across == 0:
        return 0.0
    return 1 - (_mean_distance(x, x) + _mean_distance(y, y)) / (2 * across)


def _mean_distance(x: FloatArray, y: FloatArray) -> float:
    """Mean distance of rows with different numbers."""
    total, squares = 0.0, np.square(y).sum(1)
    for start in range(0, len(x), _ROWS):
        rows = x[start : start + _ROWS]
        apart = np.square(rows).sum(1)[:, None] + squares - 2 * rows @ y.T
        distances = np.sqrt(np.maximum(apart, 0))
        own = np.arange(len(rows))
        distances[own, start + own] = 0
        total += float(distances.sum())
    return total / (len(x) * (len(x) - 1))


def _unbiased_hsic(x: FloatArray, y: FloatArray) -> float:
    """Unbiased HSIC of two linear kernels, without forming an n x n matrix."""
    n = len(x)
    own_x, own_y = np.square(x).sum(1), np.square(y).sum(1)
    cross = np.square(x.T @ y).sum() - own_x @ own_y
    rows_x, rows_y = x @ x.sum(0) - own_x, y @ y.sum(0) - own_y
    total = rows_x.sum() * rows_y.sum() / ((n - 1) * (n - 2))
    return float((cross + total - 2 / (n - 2) * (rows_x @ rows_y)) / (n * (n - 3)))


def _gram(x: FloatArray) -> FloatArray:
    """The smaller of ``X' X`` and ``X X'``; they have the same Frobenius norm."""
    return x.T @ x if x.shape[0] > x.shape[1] else x @ x.T


def _is_constant(x: FloatArray) -> bool:
    return bool(np.square(x - x.mean(0)).sum() <= _CONSTANT * np.square(x).sum())


def _unit(x: NDArray[np.float64]) -> FloatArray:
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(norms > 0, norms, 1)
