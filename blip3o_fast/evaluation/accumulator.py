"""Streaming evaluation: batches in, one ``Metrics`` out.

It keeps a few numbers, four means and two tokens of width C per sample. At C = 1024 that is 24 KB
per sample: 5,000 COCO images take 120 MB, where all of their tokens would take 5 GB.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from blip3o_fast.axes import check_shape
from blip3o_fast.evaluation.bootstrap import (
    Estimate,
    FloatArray,
    check_settings,
    estimate_means,
    estimate_ratio,
)
from blip3o_fast.evaluation.metrics import (
    QUANTILES,
    RECALL_AT,
    THRESHOLDS,
    ClsMetrics,
    Metrics,
    SampleScores,
    cls_rows,
    patch_rows,
)
from blip3o_fast.evaluation.similarity import (
    energy_distance,
    linear_cka,
    linear_cka_debiased,
    retrieval_hits,
)


class MetricAccumulator:
    """Collects batches of generated and target tokens, then summarises them.

    Examples:
        >>> accumulator = MetricAccumulator(train_mean=torch.zeros(4, 8))
        >>> x = torch.randn(3, 4, 8)
        >>> accumulator.add(x, x, keys=["a", "b", "c"])
        >>> round(accumulator.finish(bootstrap=0).token_cosine.value, 6)
        1.0

    Args:
        train_mean: mean of the training targets, ``[C]`` or ``[N, C]``, the CLS row included where
            there is one.
        has_cls: whether token 0 is a CLS token.
    """

    def __init__(self, train_mean: Tensor, *, has_cls: bool = False) -> None:
        if train_mean.dim() not in (1, 2):
            raise ValueError(f"train_mean: expected [N, C] or [C], got {list(train_mean.shape)}")
        if not torch.isfinite(train_mean).all():
            raise ValueError("train_mean: expected finite numbers, got NaN or Inf")
        self._train_mean = train_mean.detach().float()
        self._has_cls = has_cls
        self._keys: dict[str, str] = {}
        self._rows: dict[str, list[NDArray[Any]]] = {}
        self._position_sum: FloatArray | None = None

    def add(
        self,
        generated: Tensor,
        target: Tensor,
        keys: Sequence[str],
        sources: Sequence[str] | None = None,
    ) -> None:
        """Add one batch. Arithmetic is fp32 on the tensors' device, whatever their dtype.

        Args:
            generated, target: ``[n, N, C]``.
            keys: n names, each seen once.
            sources: n photo names, the clusters of the bootstrap; None: each sample is its own.

        Raises:
            ValueError: on wrong shapes, a repeated key, or a value that is not finite; nothing is
                added then.
        """
        sources = keys if sources is None else sources
        self._check(generated, target, keys, sources)
        mean = self._train_mean.to(generated.device).expand(generated.shape[1:])
        g, x = generated.detach().float(), target.detach().float()
        skip = int(self._has_cls)
        rows, cosines = patch_rows(g[:, skip:], x[:, skip:], mean[skip:])
        if self._has_cls:
            rows.update(cls_rows(g[:, 0], x[:, 0], mean[0]))
        which, places = self._chosen_tokens(len(g), cosines.shape[1], g.device)
        rows["generated_token"] = (g - mean)[which, places]
        rows["target_token"] = (x - mean)[which, places]
        self._keys.update(zip(keys, sources, strict=True))
        for name, values in rows.items():
            self._rows.setdefault(name, []).append(values.cpu().numpy())
        position = cosines.sum(0).cpu().double().numpy()
        self._position_sum = position + (0 if self._position_sum is None else self._position_sum)

    def scores(self) -> SampleScores:
        """The per-sample values so far."""
        self._require_samples()
        names = ("token_cosine", "image_cosine", "centred_cosine", "mse")
        columns = {name: self._column(name) for name in names}
        return SampleScores(tuple(self._keys), tuple(self._keys.values()), **columns)

    def finish(self, *, bootstrap: int = 2000, confidence: float = 0.95, seed: int = 0) -> Metrics:
        """Summarise what was added; more may be added afterwards.

        Args:
            bootstrap: resamples of the source photos; 0 leaves the intervals out.
            confidence: of the intervals.
            seed: of the resampling.
        """
        self._require_samples()
        check_settings(bootstrap, confidence)
        scores = self.scores()
        generated, target = self._column("generated_mean"), self._column("target_mean")
        columns = self._mean_columns(scores)
        settings = {"replicates": bootstrap, "confidence": confidence, "seed": seed}
        means = estimate_means(columns, scores.sources, **settings)
        variance = self._target_variance()
        unexplained = estimate_ratio(self._column("mse"), variance, scores.sources, **settings)
        spread = estimate_ratio(
            self._column("generated_variance"), variance, scores.sources, **settings
        )
        assert self._position_sum is not None
        recall_at = [k for k in RECALL_AT if k < len(scores.keys)]
        return Metrics(
            samples=len(scores.keys),
            sources=len(set(scores.sources)),
            tokens=len(self._position_sum),
            resamples=bootstrap,
            confidence=confidence,
            token_cosine=means["token_cosine"],
            image_cosine=means["image_cosine"],
            centred_cosine=means["centred_cosine"],
            mse=means["mse"],
            r2=_one_minus(unexplained),
            variance_ratio=spread,
            energy_distance=energy_distance(
                self._column("generated_token"), self._column("target_token")
            ),
            recall_generated_to_target={k: means[f"forward {k}"] for k in recall_at},
            recall_target_to_generated={k: means[f"backward {k}"] for k in recall_at},
            cka=linear_cka(generated, target),
            cka_debiased=linear_cka_debiased(generated, target),
            image_cosine_above={t: means[f"above {t}"] for t in THRESHOLDS},
            quantiles=_quantiles(scores),
            position_cosine=tuple((self._position_sum / len(scores.keys)).tolist()),
            cls=self._cls(means),
        )

    def _mean_columns(self, scores: SampleScores) -> dict[str, FloatArray]:
        """Every per-sample value whose mean is a metric."""
        hits = retrieval_hits(
            self._column("generated_centred_mean"), self._column("target_centred_mean"), RECALL_AT
        )
        columns = {
            "token_cosine": scores.token_cosine,
            "image_cosine": scores.image_cosine,
            "centred_cosine": scores.centred_cosine,
            "mse": scores.mse,
        }
        for way, values in zip(("forward", "backward"), hits, strict=True):
            columns |= {f"{way} {k}": values[:, i] for i, k in enumerate(RECALL_AT)}
        columns |= {f"above {t}": (scores.image_cosine > t).astype(float) for t in THRESHOLDS}
        if self._has_cls:
            names = ("cls_cosine", "cls_centred_cosine", "cls_mse")
            columns |= {name: self._column(name) for name in names}
        return columns

    def _chosen_tokens(self, n: int, patches: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The next n samples of a batch, and one patch of each: another from sample to sample."""
        which = torch.arange(n, device=device)
        return which, int(self._has_cls) + (which + len(self._keys)) % patches

    def _cls(self, means: Mapping[str, Estimate]) -> ClsMetrics | None:
        if not self._has_cls:
            return None
        return ClsMetrics(means["cls_cosine"], means["cls_centred_cosine"], means["cls_mse"])

    def _target_variance(self) -> FloatArray:
        variance = self._column("target_variance")
        if not variance.sum() > 0:
            raise ValueError("target: expected tokens that vary, got the training mean everywhere")
        return variance

    def _column(self, name: str) -> FloatArray:
        return np.concatenate(self._rows[name]).astype(np.float64)

    def _require_samples(self) -> None:
        if not self._keys:
            raise ValueError("metrics: expected at least one sample, got none; call add() first")

    def _check(
        self, generated: Tensor, target: Tensor, keys: Sequence[str], sources: Sequence[str]
    ) -> None:
        check_shape("generated", generated, "B N C")
        n, N, C = generated.shape
        check_shape("target", target, "B N C", B=n, N=N, C=C)
        expected = (N, C) if self._train_mean.dim() == 2 else (C,)
        if tuple(self._train_mean.shape) != expected:
            raise ValueError(
                f"generated: expected tokens like the training mean's "
                f"{list(self._train_mean.shape)}, got [N={N}, C={C}]"
            )
        if n == 0 or N - self._has_cls < 1:
            raise ValueError(f"generated: expected samples with patches, got {[n, N, C]}")
        if self._position_sum is not None and len(self._position_sum) != N - self._has_cls:
            raise ValueError(
                f"generated: expected {len(self._position_sum) + self._has_cls} tokens per sample "
                f"as before, got {N}"
            )
        _check_names(keys, sources, n, self._keys)
        _check_finite(generated, target, keys)


def _one_minus(estimate: Estimate) -> Estimate:
    if estimate.low is None or estimate.high is None:
        return Estimate(1 - estimate.value)
    return Estimate(1 - estimate.value, 1 - estimate.high, 1 - estimate.low)


def _quantiles(scores: SampleScores) -> dict[str, dict[float, float]]:
    names = ("token_cosine", "image_cosine", "centred_cosine", "mse")
    return {
        name: {q: float(np.quantile(getattr(scores, name), q)) for q in QUANTILES} for name in names
    }


def _check_names(
    keys: Sequence[str], sources: Sequence[str], n: int, seen: Mapping[str, str]
) -> None:
    for name, values in (("keys", keys), ("sources", sources)):
        if isinstance(values, str) or len(values) != n:
            raise ValueError(f"{name}: expected a list of {n} names, got {len(values)}")
    batch = set(keys)
    repeated = next((key for key in keys if key in seen), None)
    if repeated is not None or len(batch) != n:
        raise ValueError(f"keys: expected each sample once, got {repeated or list(keys)!r} again")


def _check_finite(generated: Tensor, target: Tensor, keys: Sequence[str]) -> None:
    for name, x in (("generated", generated), ("target", target)):
        bad = ~torch.isfinite(x).flatten(1).all(1)
        if bad.any():
            key = keys[int(bad.nonzero()[0])]
            raise ValueError(f"{name}: expected finite numbers, got NaN or Inf in sample {key!r}")
