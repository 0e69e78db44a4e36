import itertools

import numpy as np
import pytest
import torch

from blip3o_fast.evaluation import Baselines, MeanPredictor, RidgeRegression, TrainingBatch
from blip3o_fast.evaluation.baselines import HELD_OUT_EVERY
from blip3o_fast.evaluation.moments import STRENGTHS

N, E, C = 3, 8, 5


def simulate(photos=20, crops=2, noise=0.5, tokens=N, seed=0):
    """Badly scaled EVA tokens with a large mean, one constant channel, a noisy linear target."""
    generator = torch.Generator().manual_seed(seed)
    n = photos * crops
    z = torch.randn(n, tokens, E, generator=generator)
    z[..., -1] = 0
    eva = z * torch.logspace(-2, 2, E) + 50
    clip = z @ torch.randn(E, C, generator=generator) + 3
    clip = clip + noise * torch.randn(n, tokens, C, generator=generator)
    return eva, clip, [f"photo{i // crops}" for i in range(n)]


def batches(eva, clip, sources, size=7):
    for i in range(0, len(eva), size):
        yield TrainingBatch(eva[i : i + size], clip[i : i + size], sources[i : i + size])


def closed_form(x, y, strength):
    """Ridge on standardised tokens with a free bias, as an augmented least-squares system."""
    x, y = x.double().flatten(0, 1).numpy(), y.double().flatten(0, 1).numpy()
    mean, std = x.mean(0), x.std(0)
    std[std < 1e-9] = 1
    z = (x - mean) / std
    penalty = np.sqrt(strength * len(x)) * np.eye(E)
    a = np.vstack((z, penalty))
    b = np.vstack((y - y.mean(0), np.zeros((E, y.shape[1]))))
    weight = np.linalg.lstsq(a, b, rcond=None)[0]

    def predict(eva):
        return ((eva.double().numpy() - mean) / std) @ weight + y.mean(0)

    return predict


def test_mean_predictor_is_the_mean_of_each_position():
    eva, clip, sources = simulate()
    mean = MeanPredictor.fit(batches(eva, clip, sources))
    torch.testing.assert_close(mean.mean, clip.double().mean(0).float(), rtol=0, atol=0)
    predicted = mean.predict(eva[:4])
    assert predicted.shape == (4, N, C)
    torch.testing.assert_close(predicted[3], mean.mean, rtol=0, atol=0)


def test_ridge_equals_the_closed_form():
    eva, clip, sources = simulate()
    ridge = RidgeRegression.fit(batches(eva, clip, sources))
    expected = closed_form(eva, clip, ridge.patch.strength)(eva)
    np.testing.assert_allclose(ridge.predict(eva).numpy(), expected, rtol=1e-5, atol=1e-5)


def test_ridge_equals_its_normal_equations():
    eva, clip, sources = simulate(noise=3.0, photos=10)
    ridge = RidgeRegression.fit(batches(eva, clip, sources))
    x, y = eva.double().flatten(0, 1), clip.double().flatten(0, 1)
    std = x.std(0, unbiased=False)
    z = (x - x.mean(0)) / torch.where(std > 1e-9, std, 1)
    gram = z.T @ z + len(z) * ridge.patch.strength * torch.eye(E, dtype=torch.float64)
    weight = torch.linalg.solve(gram, z.T @ (y - y.mean(0)))
    expected = (z @ weight + y.mean(0)).view(clip.shape)
    torch.testing.assert_close(ridge.predict(eva).double(), expected, rtol=1e-5, atol=1e-5)


def test_strength_is_tuned_on_photos_set_aside():
    """Every candidate's error is that of a fit on four photos in five, measured on the fifth."""
    eva, clip, sources = simulate(noise=4.0, photos=15)
    ridge = RidgeRegression.fit(batches(eva, clip, sources))
    order = list(dict.fromkeys(sources))
    aside = np.array([order.index(s) % HELD_OUT_EVERY == 1 for s in sources])
    for strength, error in ridge.patch.tuning.items():
        predict = closed_form(eva[~aside], clip[~aside], strength)
        expected = ((predict(eva[aside]) - clip[aside].double().numpy()) ** 2).mean()
        assert error == pytest.approx(expected, rel=1e-6)
    assert tuple(ridge.patch.tuning) == STRENGTHS
    assert ridge.patch.strength == min(ridge.patch.tuning, key=ridge.patch.tuning.__getitem__)
    assert STRENGTHS[0] < ridge.patch.strength < STRENGTHS[-1]


def test_crops_of_one_photo_stay_together():
    """Targets that only a photo's own crops reveal must not make a weak penalty look good."""
    generator = torch.Generator().manual_seed(2)
    photos, crops, width = 30, 6, 60
    eva = torch.randn(photos, 1, 1, width, generator=generator).expand(-1, crops, 1, -1)
    eva = (eva + 1e-3 * torch.randn(photos, crops, 1, width, generator=generator)).flatten(0, 1)
    clip = torch.randn(photos, 1, 1, 4, generator=generator).expand(-1, crops, 1, -1).flatten(0, 1)
    sources = [f"photo{i // crops}" for i in range(photos * crops)]
    together = RidgeRegression.fit([TrainingBatch(eva, clip, sources)])
    leaking = RidgeRegression.fit([TrainingBatch(eva, clip, [str(i) for i in range(len(eva))])])
    assert together.patch.strength >= 10
    assert leaking.patch.strength <= 0.1


def test_held_out_data_cannot_reach_the_baselines():
    """Poisoning held-out photos, which share storage with the training batches, is not felt."""
    eva, clip, sources = simulate(noise=2.0)
    train = slice(0, 34)
    clean = Baselines.fit(batches(eva[train], clip[train], sources[train]))
    expected = clean.ridge.predict(eva[train])
    eva[34:], clip[34:] = torch.nan, 1e30
    poisoned = Baselines.fit(batches(eva[train], clip[train], sources[train]))
    assert clean.ridge.patch.tuning == poisoned.ridge.patch.tuning
    assert torch.equal(poisoned.ridge.predict(eva[train]), expected)
    assert torch.equal(clean.mean.mean, poisoned.mean.mean)
    with pytest.raises(
        ValueError, match="eva: expected finite numbers, got NaN or Inf in 'photo17'"
    ):
        Baselines.fit(batches(eva, clip, sources))


def test_tuning_does_not_see_how_held_out_data_would_choose():
    """With held-out targets that reward another strength, the choice follows the training data."""
    eva, clip, sources = simulate(noise=0.01)
    held_eva, held_clip, _ = simulate(noise=0.01, seed=9)
    held_clip = held_clip.mean((0, 1)).expand_as(held_clip)  # best answered by a constant
    ridge = RidgeRegression.fit(batches(eva, clip, sources))

    def held_out_error(strength):
        predicted = closed_form(eva, clip, strength)(held_eva)
        return ((predicted - held_clip.double().numpy()) ** 2).mean()

    assert min(STRENGTHS, key=held_out_error) == STRENGTHS[-1]
    assert ridge.patch.strength < 1e-3


def test_batches_and_dtypes_do_not_matter():
    eva, clip, sources = simulate()
    small = RidgeRegression.fit(batches(eva, clip, sources, size=1))
    whole = RidgeRegression.fit(batches(eva.double(), clip, sources, size=1000))
    torch.testing.assert_close(small.predict(eva), whole.predict(eva), rtol=1e-6, atol=1e-6)
    rounded = RidgeRegression.fit(batches(eva.bfloat16(), clip.bfloat16(), sources))
    expected = closed_form(eva.bfloat16(), clip.bfloat16(), rounded.patch.strength)(eva.bfloat16())
    got = rounded.predict(eva.bfloat16())
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_moments_do_not_cancel():
    """A mean 1e5 deviations away costs fp32 sums every digit; here the fit stays exact."""
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(200, 4, 3, generator=generator, dtype=torch.float64)
    clip = z @ torch.randn(3, 2, generator=generator, dtype=torch.float64)
    sources = [str(i) for i in range(200)]
    ridge = RidgeRegression.fit(batches(z * 1e-3 + 100, clip, sources))
    assert ridge.patch.strength == STRENGTHS[0]
    weight = ridge.patch.weight.double() * 1e-3
    expected = torch.linalg.lstsq(z.flatten(0, 1), clip.flatten(0, 1)).solution
    torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-4)


def test_more_channels_than_tokens():
    generator = torch.Generator().manual_seed(4)
    eva = torch.randn(6, 2, 40, generator=generator)
    clip = torch.randn(6, 2, 3, generator=generator)
    ridge = RidgeRegression.fit([TrainingBatch(eva, clip, list("abcdef"))])
    assert torch.isfinite(ridge.predict(eva)).all()


def test_cls_has_its_own_map():
    eva, clip, sources = simulate(tokens=N + 1)
    clip[:, 0] = -clip[:, 0]
    ridge = RidgeRegression.fit(batches(eva, clip, sources), has_cls=True)
    assert ridge.cls is not None
    cls = closed_form(eva[:, :1], clip[:, :1], ridge.cls.strength)(eva[:, :1])
    patches = closed_form(eva[:, 1:], clip[:, 1:], ridge.patch.strength)(eva[:, 1:])
    got = ridge.predict(eva).numpy()
    np.testing.assert_allclose(got, np.concatenate((cls, patches), 1), rtol=1e-5, atol=1e-5)


def test_one_pass_fits_both():
    eva, clip, sources = simulate()
    stream = iter(list(batches(eva, clip, sources)))
    both = Baselines.fit(stream)
    assert next(stream, None) is None
    assert torch.equal(both.mean.mean, MeanPredictor.fit(batches(eva, clip, sources)).mean)
    alone = RidgeRegression.fit(batches(eva, clip, sources))
    assert torch.equal(both.ridge.predict(eva), alone.predict(eva))


def test_ridge_beats_the_mean_on_new_photos():
    eva, clip, sources = simulate(photos=40)
    both = Baselines.fit(batches(eva[:60], clip[:60], sources[:60]))
    errors = [
        (model.predict(eva[60:]) - clip[60:]).square().mean().item()
        for model in (both.ridge, both.mean)
    ]
    assert errors[0] < 0.5
    assert errors[1] > 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip": torch.zeros(4, N + 1, C)}, r"clip: expected shape \[B=4, N=3, C\]"),
        ({"eva": torch.zeros(4, E)}, r"eva: expected shape \[B, N, E\]"),
        ({"sources": ["a"]}, "sources: expected a list of 4 names, got 1"),
        ({"sources": "abcd"}, "sources: expected a list of 4 names"),
        ({"sources": ["a"] * 4}, "training photos: expected two or more"),
    ],
)
def test_bad_batches_are_refused(change, message):
    fields = {"eva": torch.randn(4, N, E), "clip": torch.randn(4, N, C), "sources": list("abcd")}
    with pytest.raises(ValueError, match=message):
        Baselines.fit([TrainingBatch(**{**fields, **change})])


def test_widths_must_not_change():
    eva, clip, sources = simulate()
    stream = itertools.chain(
        batches(eva, clip, sources), [TrainingBatch(eva[..., 1:], clip, sources)]
    )
    with pytest.raises(ValueError, match="expected widths E=8, C=5 as in the first batch, got E=7"):
        RidgeRegression.fit(stream)


@pytest.mark.parametrize("fit", [MeanPredictor.fit, RidgeRegression.fit, Baselines.fit])
def test_no_batches_are_refused(fit):
    with pytest.raises(ValueError, match="expected at least one training batch"):
        fit([])


def test_wrong_input_to_predict_is_refused():
    eva, clip, sources = simulate()
    both = Baselines.fit(batches(eva, clip, sources))
    with pytest.raises(ValueError, match=r"eva: expected shape \[B, N, E=8\], got"):
        both.ridge.predict(eva[..., 1:])
    with pytest.raises(ValueError, match=r"eva: expected shape \[B, N=3, E\], got"):
        both.mean.predict(eva[:, 1:])


@pytest.mark.gpu
def test_fit_on_a_device():
    eva, clip, sources = simulate()
    here = Baselines.fit(batches(eva, clip, sources))
    there = Baselines.fit(batches(eva.cuda(), clip.cuda(), sources))
    assert here.ridge.patch.strength == there.ridge.patch.strength
    torch.testing.assert_close(
        here.ridge.predict(eva), there.ridge.predict(eva.cuda()).cpu(), rtol=1e-4, atol=1e-4
    )
