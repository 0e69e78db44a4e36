import dataclasses

import numpy as np
import pytest

from blip3o_fast.evaluation import SampleScores
from blip3o_fast.evaluation.verdict import judge


def scores(token_cosine, photos=20):
    values = np.asarray(token_cosine, dtype=float)
    keys = tuple(f"s{i}" for i in range(len(values)))
    sources = tuple(f"p{i % photos}" for i in range(len(values)))
    return SampleScores(keys, sources, values, values, values, values)


HARDNESS = np.linspace(0.2, 0.8, 60)
WOBBLE = 0.01 * np.sin(np.arange(60) * 1.7)


@pytest.mark.parametrize(
    ("advantage", "beats", "clear", "opening"),
    [
        (0.02, True, True, "The DiT beats ridge regression: +0.0"),
        (0.0003, True, False, "The DiT is ahead of ridge regression by +0.0003"),
        (-0.0003, False, False, "The DiT does not beat ridge regression: -0.0003"),
        (-0.02, False, True, "The DiT does not beat ridge regression: -0.0"),
    ],
)
def test_sentence_and_interval(advantage, beats, clear, opening):
    ridge, wobble = scores(HARDNESS), WOBBLE - WOBBLE.mean()
    dit = scores(HARDNESS + wobble + advantage)
    verdict = judge(dit, ridge, scores(HARDNESS - 0.5), evaluations=4)
    assert (verdict.beats_ridge, verdict.clear) == (beats, clear)
    assert verdict.sentence.startswith(opening)
    assert "evaluations (4)" in verdict.sentence
    assert verdict.over_ridge.value == pytest.approx(advantage)
    assert verdict.over_ridge.low < advantage < verdict.over_ridge.high
    assert f"{verdict.over_ridge.low:+.4f} to {verdict.over_ridge.high:+.4f}" in verdict.sentence
    assert verdict.over_mean.value == pytest.approx(advantage + 0.5)
    assert verdict.to_dict()["over_mean"]["value"] == verdict.over_mean.value


def test_pairing_removes_what_both_methods_find_hard():
    """The spread of hard and easy photos is 60 times that of the difference."""
    verdict = judge(
        scores(HARDNESS + WOBBLE + 0.01), scores(HARDNESS), scores(HARDNESS - 1), evaluations=1
    )
    assert verdict.over_ridge.high - verdict.over_ridge.low < 0.01


def test_a_loss_to_the_mean_predictor_is_told():
    verdict = judge(
        scores(HARDNESS), scores(HARDNESS + 0.1), scores(HARDNESS + 0.05), evaluations=1
    )
    assert verdict.sentence.endswith(
        "Nor does it beat the mean predictor, which never looks at the image."
    )


def test_a_single_photo_gives_no_interval():
    dit, ridge, mean = (scores(HARDNESS + d, photos=1) for d in (0.1, 0.0, -0.1))
    verdict = judge(dit, ridge, mean, evaluations=1)
    assert verdict.over_ridge.low is None
    assert not verdict.clear
    assert "no interval from a single photo" in verdict.sentence


def test_other_samples_are_refused():
    other = dataclasses.replace(scores(HARDNESS), keys=tuple("abc"))
    with pytest.raises(ValueError, match="same samples in the same order"):
        judge(scores(HARDNESS), other, scores(HARDNESS), evaluations=1)
