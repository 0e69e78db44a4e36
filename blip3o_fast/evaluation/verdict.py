"""Does the DiT beat the baselines? A paired difference over the same samples, and a sentence."""

from dataclasses import asdict, dataclass
from typing import Any

from blip3o_fast.evaluation.bootstrap import Estimate, estimate_means
from blip3o_fast.evaluation.metrics import SampleScores

_RESAMPLES = 2000


@dataclass(frozen=True)
class Verdict:
    """The DiT at its best number of evaluations against the baselines, by token cosine.

    Attributes:
        beats_ridge: the mean over the held-out samples is higher.
        clear: the paired interval against ridge does not include zero.
        over_ridge, over_mean: DiT minus baseline, sample by sample, resampling photos.
        sentence: the same in words.
    """

    beats_ridge: bool
    clear: bool
    over_ridge: Estimate
    over_mean: Estimate
    sentence: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return asdict(self)


def judge(
    dit: SampleScores,
    ridge: SampleScores,
    mean: SampleScores,
    *,
    evaluations: int,
    confidence: float = 0.95,
    seed: int = 0,
) -> Verdict:
    """Compare three methods on the same samples.

    A paired interval is much narrower than two separate ones, because hard photos are hard for
    both.
    """
    if not dit.keys == ridge.keys == mean.keys:
        raise ValueError("scores: expected every method on the same samples in the same order")
    differences = estimate_means(
        {
            "ridge": dit.token_cosine - ridge.token_cosine,
            "mean": dit.token_cosine - mean.token_cosine,
        },
        dit.sources,
        replicates=_RESAMPLES,
        confidence=confidence,
        seed=seed,
    )
    over_ridge, over_mean = differences["ridge"], differences["mean"]
    clear = _excludes_zero(over_ridge)
    sentence = _compare(over_ridge, clear, evaluations, confidence)
    if over_mean.value <= 0:
        sentence += " Nor does it beat the mean predictor, which never looks at the image."
    return Verdict(over_ridge.value > 0, clear, over_ridge, over_mean, sentence)


def _compare(difference: Estimate, clear: bool, evaluations: int, confidence: float) -> str:
    amount = f"{difference.value:+.4f}"
    if difference.low is None:
        interval = "no interval from a single photo"
    else:
        interval = f"{confidence:.0%} interval {difference.low:+.4f} to {difference.high:+.4f}"
    where = f"held-out token cosine at its best number of evaluations ({evaluations})"
    if difference.value <= 0:
        return f"The DiT does not beat ridge regression: {amount} in {where}, {interval}."
    if clear:
        return f"The DiT beats ridge regression: {amount} in {where}, {interval}."
    return (
        f"The DiT is ahead of ridge regression by {amount} in {where}, but not clearly: {interval}."
    )


def _excludes_zero(estimate: Estimate) -> bool:
    return (
        estimate.low is not None
        and estimate.high is not None
        and (estimate.low > 0 or estimate.high < 0)
    )
