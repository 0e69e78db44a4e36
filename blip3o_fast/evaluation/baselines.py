"""The two baselines that every result stands beside, fitted on training batches only.

* The mean predictor returns the mean training target at each position and ignores its input.
* Ridge regression maps each EVA token to the CLIP token at the same place by one linear map,

      y = mean_y + W' z        z = (x - mean_x) / std_x        W = (Z'Z + n s I)^-1 Z'(Y - mean_y)

  with Z the n standardised EVA tokens, s the strength, and mean_y an unpenalised bias.

The strength is chosen inside the training data: photos are numbered as they first appear, one in
five is set aside, every strength is fitted on the rest and scored on those, and the best is fitted
again on everything. Fitting needs second moments only, so one pass over any stream of batches is
enough; they are fp64 and, at E = 4096 and C = 1024, take 0.2 GB for each of the two parts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from blip3o_fast.axes import check_shape
from blip3o_fast.evaluation.moments import LinearMap, Moments, tune

HELD_OUT_EVERY = 5
"""One photo in this many is set aside to choose the strength of ridge regression."""


class PairedTokens(Protocol):
    """What the baselines read of a batch; batches of ``blip3o_fast.data`` provide it."""

    @property
    def eva(self) -> Tensor:
        """``[n, N, E]``."""
        ...

    @property
    def clip(self) -> Tensor:
        """``[n, N, C]``."""
        ...

    @property
    def sources(self) -> Sequence[str]:
        """The photo of each of the n samples."""
        ...


class TrainingBatch(NamedTuple):
    """Paired tokens of n training samples: the simplest ``PairedTokens``."""

    eva: Tensor
    clip: Tensor
    sources: Sequence[str]


@dataclass(frozen=True, eq=False)
class MeanPredictor:
    """Predicts ``mean`` ``[N, C]`` for every sample; centred metrics remove the same mean."""

    mean: Tensor

    @classmethod
    def fit(cls, batches: Iterable[PairedTokens]) -> "MeanPredictor":
        """Average the training targets, in fp64.

        Raises:
            ValueError: on no batches, or one with wrong shapes or values that are not finite.
        """
        fit = _MeanFit()
        for batch in batches:
            _check(batch)
            fit.add(batch)
        return fit.finish()

    def predict(self, eva: Tensor) -> Tensor:
        """``[n, N, C]`` in fp32 on the device of ``eva`` ``[n, N, E]``."""
        check_shape("eva", eva, "B N E", N=self.mean.shape[0])
        return self.mean.to(eva.device).expand(eva.shape[0], *self.mean.shape)


@dataclass(frozen=True, eq=False)
class RidgeRegression:
    """A tuned linear map for patch tokens, and another one for CLS tokens if there are any."""

    patch: LinearMap
    cls: LinearMap | None = None

    @classmethod
    def fit(cls, batches: Iterable[PairedTokens], *, has_cls: bool = False) -> "RidgeRegression":
        """Tune and fit in one pass, on the device of the batches (the CPU where it lacks fp64).

        Args:
            batches: training data only.
            has_cls: whether token 0 is a CLS token.

        Raises:
            ValueError: on no batches, fewer than two photos, wrong shapes, or values that are not
                finite.
        """
        fit = _RidgeFit(has_cls)
        for batch in batches:
            _check(batch)
            fit.add(batch)
        return fit.finish()

    def predict(self, eva: Tensor) -> Tensor:
        """``[n, N, C]`` in fp32 on the device of ``eva`` ``[n, N, E]``."""
        check_shape("eva", eva, "B N E", E=self.patch.weight.shape[0])
        if self.cls is None:
            return self.patch.apply(eva)
        return torch.cat((self.cls.apply(eva[:, :1]), self.patch.apply(eva[:, 1:])), dim=1)


@dataclass(frozen=True, eq=False)
class Baselines:
    """Both baselines, fitted on the same batches."""

    mean: MeanPredictor
    ridge: RidgeRegression

    @classmethod
    def fit(cls, batches: Iterable[PairedTokens], *, has_cls: bool = False) -> "Baselines":
        """Fit both in one pass over training ``batches``; errors as in ``RidgeRegression.fit``."""
        mean, ridge = _MeanFit(), _RidgeFit(has_cls)
        for batch in batches:
            _check(batch)
            mean.add(batch)
            ridge.add(batch)
        return cls(mean.finish(), ridge.finish())


class _MeanFit:
    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, batch: PairedTokens) -> None:
        if self._sum is None:
            shape = batch.clip.shape[1:]
            self._sum = torch.zeros(shape, dtype=torch.float64, device=_exact_device(batch.clip))
        check_shape("clip", batch.clip, "B N C", N=self._sum.shape[0], C=self._sum.shape[1])
        self._sum += batch.clip.detach().to(self._sum.device).double().sum(0)
        self._count += len(batch.clip)

    def finish(self) -> MeanPredictor:
        if self._sum is None:
            raise ValueError("batches: expected at least one training batch, got none")
        return MeanPredictor((self._sum / self._count).float())


class _RidgeFit:
    """Second moments of the photos to fit on and of those set aside, for patches and for CLS."""

    def __init__(self, has_cls: bool) -> None:
        self._roles = (slice(1), slice(1, None)) if has_cls else (slice(None),)
        self._parts: list[tuple[Moments, Moments]] = []
        self._photos: dict[str, int] = {}

    def add(self, batch: PairedTokens) -> None:
        device = _exact_device(batch.eva)
        numbers = [self._photos.setdefault(s, len(self._photos)) for s in batch.sources]
        aside = torch.tensor([i % HELD_OUT_EVERY == 1 for i in numbers], device=device)
        eva, clip = batch.eva.detach().to(device), batch.clip.detach().to(device)
        if not self._parts:
            self._parts = [self._new_parts(eva[:, r], clip[:, r]) for r in self._roles]
        for role, (fit, held) in zip(self._roles, self._parts, strict=True):
            fit.add(eva[~aside, role], clip[~aside, role])
            held.add(eva[aside, role], clip[aside, role])

    def finish(self) -> RidgeRegression:
        if not self._parts:
            raise ValueError("batches: expected at least one training batch, got none")
        if len(self._photos) < 2:
            raise ValueError(
                "training photos: expected two or more to tune the ridge strength on, got 1"
            )
        maps = [tune(fit, held) for fit, held in self._parts]
        return RidgeRegression(maps[-1], maps[0] if len(maps) == 2 else None)

    @staticmethod
    def _new_parts(eva: Tensor, clip: Tensor) -> tuple[Moments, Moments]:
        origin = (eva.double().mean((0, 1)), clip.double().mean((0, 1)))
        return Moments(*origin), Moments(*origin)


def _exact_device(x: Tensor) -> torch.device:
    """Where fp64 arithmetic on ``x`` can run: Apple's GPUs have none."""
    return torch.device("cpu") if x.device.type == "mps" else x.device


def _check(batch: PairedTokens) -> None:
    eva, clip, sources = batch.eva, batch.clip, batch.sources
    check_shape("eva", eva, "B N E")
    check_shape("clip", clip, "B N C", B=eva.shape[0], N=eva.shape[1])
    if isinstance(sources, str) or len(sources) != len(eva):
        raise ValueError(f"sources: expected a list of {len(eva)} names, got {len(sources)}")
    if len(eva) == 0:
        raise ValueError("batch: expected at least one sample, got none")
    for name, x in (("eva", eva), ("clip", clip)):
        bad = ~torch.isfinite(x).flatten(1).all(1)
        if bad.any():
            source = sources[int(bad.nonzero()[0])]
            raise ValueError(f"{name}: expected finite numbers, got NaN or Inf in {source!r}")
