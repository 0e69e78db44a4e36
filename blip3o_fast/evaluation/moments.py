"""Second moments of token pairs, and ridge regression solved from them.

x and y are measured from an origin near their means, the mean of the first batch, so that centring
loses no digits. The sums are n, sum x, sum y, X'X, X'Y and sum |y|^2, all fp64. Moments of two
parts of the data can be added. They give the solution on one part and its exact error on the other.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

STRENGTHS = tuple(10.0 ** (k / 2) for k in range(-12, 5))
"""Candidates, 1e-6 to 1e2 in half decades; 1 is the variance of a standardised channel."""

_ROWS = 8192  # tokens converted to fp64 at a time: 268 MB at E = 4096
_CONSTANT = 1e-12  # variance, relative to the largest, below which a channel is constant


class Moments:
    """Running sums of token pairs ``x [E]``, ``y [C]``, from the origins given (fp64)."""

    def __init__(self, x_origin: Tensor, y_origin: Tensor) -> None:
        E, C = len(x_origin), len(y_origin)
        self.x_origin, self.y_origin = x_origin, y_origin
        self.count = 0
        self.x, self.y = torch.zeros_like(x_origin), torch.zeros_like(y_origin)
        self.xx, self.xy = x_origin.new_zeros(E, E), x_origin.new_zeros(E, C)
        self.yy = x_origin.new_zeros(())

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add tokens ``[n, N, E]`` and ``[n, N, C]``; ``n`` may be 0."""
        if x.shape[-1] != len(self.x) or y.shape[-1] != len(self.y):
            raise ValueError(
                f"batch: expected widths E={len(self.x)}, C={len(self.y)} as in the first batch, "
                f"got E={x.shape[-1]}, C={y.shape[-1]}"
            )
        tokens = zip(x.flatten(0, 1).split(_ROWS), y.flatten(0, 1).split(_ROWS), strict=True)
        for some_x, some_y in tokens:
            dx, dy = some_x.double() - self.x_origin, some_y.double() - self.y_origin
            self.count += len(dx)
            self.x += dx.sum(0)
            self.y += dy.sum(0)
            self.xx.addmm_(dx.T, dx)
            self.xy.addmm_(dx.T, dy)
            self.yy += dy.square().sum()

    def merge(self, other: "Moments") -> None:
        """Add sums taken from the same origins; ``other`` stays as it is."""
        self.count += other.count
        for name in ("x", "y", "xx", "xy", "yy"):
            getattr(self, name).add_(getattr(other, name))


@dataclass(frozen=True, eq=False)
class LinearMap:
    """``x -> (x - x_mean) weight + bias``, fp32.

    Attributes:
        x_mean: ``[E]``.
        bias: ``[C]``, the mean of y, corrected for the rounding of ``x_mean`` to fp32.
        weight: ``[E, C]``, the division by each channel's deviation included.
        strength: of the penalty.
        tuning: candidate strength to mean squared error on the photos set aside.
    """

    x_mean: Tensor
    bias: Tensor
    weight: Tensor
    strength: float
    tuning: dict[float, float]

    def apply(self, x: Tensor) -> Tensor:
        """Map tokens ``[n, N, E]`` to ``[n, N, C]``."""
        x_mean, weight, bias = (u.to(x.device) for u in (self.x_mean, self.weight, self.bias))
        return (x.float() - x_mean) @ weight + bias


class Ridge:
    """The standardised normal equations of one set of moments, ready for any strength."""

    def __init__(self, moments: Moments) -> None:
        n = moments.count
        self.x_mean, self.y_mean = moments.x / n, moments.y / n
        covariance = moments.xx / n - torch.outer(self.x_mean, self.x_mean)
        variance = covariance.diagonal().clone()
        constant = variance <= _CONSTANT * variance.max()
        self._std = torch.where(constant, 1.0, variance.clamp(min=0).sqrt())
        self._gram = covariance.div_(self._std[:, None]).div_(self._std)
        cross = moments.xy / n - torch.outer(self.x_mean, self.y_mean)
        self._cross = cross.div_(self._std[:, None])

    def solve(self, strength: float) -> Tensor:
        """Weights ``[E, C]`` on tokens that are centred and not standardised."""
        penalised = self._gram.clone()
        penalised.diagonal().add_(strength)
        weight = torch.cholesky_solve(self._cross, torch.linalg.cholesky(penalised))
        return weight / self._std[:, None]

    def errors(self, strengths: tuple[float, ...], other: Moments) -> dict[float, float]:
        """Mean squared error over tokens and channels, on the data behind ``other``."""
        n, mx, my = other.count, self.x_mean, self.y_mean
        dx, dy = other.x - n * mx, other.y - n * my
        xx = other.xx - torch.outer(other.x, mx) - torch.outer(mx, dx)
        xy = other.xy - torch.outer(other.x, my) - torch.outer(mx, dy)
        yy = other.yy - my @ other.y - my @ dy
        errors = {}
        for strength in strengths:
            weight = self.solve(strength)
            squared = yy - 2 * (weight * xy).sum() + (weight * (xx @ weight)).sum()
            errors[strength] = float(squared) / (n * len(my))
        return errors


def tune(fit: Moments, held: Moments) -> LinearMap:
    """Choose the strength that does best on ``held`` after fitting on ``fit``, then fit on both.

    ``fit`` is changed: it ends as the moments of both parts.
    """
    tuning = Ridge(fit).errors(STRENGTHS, held)
    strength = min(tuning, key=lambda s: tuning[s])
    fit.merge(held)
    final = Ridge(fit)
    weight = final.solve(strength)
    x_mean, y_mean = fit.x_origin + final.x_mean, fit.y_origin + final.y_mean
    rounding = x_mean.float().double() - x_mean
    return LinearMap(
        x_mean=x_mean.float(),
        bias=(y_mean + rounding @ weight).float(),
        weight=weight.float(),
        strength=strength,
        tuning=tuning,
    )
