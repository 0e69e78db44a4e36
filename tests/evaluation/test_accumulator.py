import json

import numpy as np
import pytest
import torch

from blip3o_fast.evaluation import MetricAccumulator, token_cosines
from blip3o_fast.evaluation.bootstrap import estimate_means

N, C = 6, 10


def simulate(n=30, tokens=N, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mean = 2 * torch.randn(tokens, C, generator=generator)
    target = mean + torch.randn(n, tokens, C, generator=generator)
    generated = target + 0.8 * torch.randn(n, tokens, C, generator=generator)
    keys = [f"s{i}" for i in range(n)]
    return generated, target, mean, keys, [f"photo{i // 3}" for i in range(n)]


def cosine(a, b):
    return float(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))


def expected_rows(generated, target, mean):
    """One dictionary a sample, by loops over tokens in fp64."""
    rows = []
    for g, x in zip(generated.double().numpy(), target.double().numpy(), strict=True):
        m = mean.double().numpy()
        tokens = range(len(g))
        rows.append(
            {
                "token_cosine": np.mean([cosine(g[i], x[i]) for i in tokens]),
                "image_cosine": cosine(g.mean(0), x.mean(0)),
                "centred_cosine": np.mean([cosine(g[i] - m[i], x[i] - m[i]) for i in tokens]),
                "mse": ((g - x) ** 2).mean(),
            }
        )
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def accumulate(generated, target, mean, keys, sources, batch=7, **options):
    accumulator = MetricAccumulator(mean, **options)
    for i in range(0, len(keys), batch):
        rows = slice(i, i + batch)
        accumulator.add(generated[rows], target[rows], keys[rows], sources[rows])
    return accumulator


def test_every_metric_against_independent_formulas():
    generated, target, mean, keys, sources = data = simulate()
    accumulator = accumulate(*data)
    scores, metrics = accumulator.scores(), accumulator.finish(bootstrap=200, seed=4)
    expected = expected_rows(generated, target, mean)
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(scores, name), values, rtol=2e-6, atol=1e-6)
        assert getattr(metrics, name).value == pytest.approx(values.mean(), rel=1e-6)
        quantiles = [metrics.quantiles[name][q] for q in (0.05, 0.25, 0.5, 0.75, 0.95)]
        reference = np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95))
        np.testing.assert_allclose(quantiles, reference, rtol=2e-6, atol=1e-6)
    g, x, m = (u.double().numpy() for u in (generated, target, mean))
    assert metrics.r2.value == pytest.approx(
        1 - ((g - x) ** 2).sum() / ((x - m) ** 2).sum(), rel=1e-6
    )
    for t in (0.7, 0.8, 0.9):
        share = np.mean(expected["image_cosine"] > t)
        assert metrics.image_cosine_above[t].value == pytest.approx(share)
    assert 0 < metrics.image_cosine_above[0.9].value < 1
    assert (metrics.samples, metrics.sources, metrics.tokens) == (30, 10, N)
    assert scores.keys == tuple(keys)
    assert scores.sources == tuple(sources)


def test_retrieval_and_cka_are_of_image_means():
    generated, target, mean, keys, sources = simulate()
    metrics = accumulate(generated, target, mean, keys, sources).finish(bootstrap=0)
    g, x = generated.double().mean(1).numpy(), target.double().mean(1).numpy()
    centre = mean.double().mean(0).numpy()
    a, b = g - centre, x - centre
    cosines = (a @ b.T) / np.outer(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1))
    for k in (1, 5, 10):
        forward = np.mean([i in np.argsort(-row)[:k] for i, row in enumerate(cosines)])
        backward = np.mean([i in np.argsort(-row)[:k] for i, row in enumerate(cosines.T)])
        assert metrics.recall_generated_to_target[k].value == pytest.approx(forward)
        assert metrics.recall_target_to_generated[k].value == pytest.approx(backward)
    assert metrics.recall_generated_to_target[1].value < 1
    gc, xc = g - g.mean(0), x - x.mean(0)
    expected = np.square(gc.T @ xc).sum() / np.linalg.norm(gc.T @ gc) / np.linalg.norm(xc.T @ xc)
    assert metrics.cka == pytest.approx(expected, rel=1e-5)


def test_position_cosine_is_the_mean_over_samples():
    generated, target, mean, keys, sources = simulate()
    metrics = accumulate(generated, target, mean, keys, sources).finish(bootstrap=0)
    expected = [
        np.mean([cosine(generated[s, i].numpy(), target[s, i].numpy()) for s in range(30)])
        for i in range(N)
    ]
    np.testing.assert_allclose(metrics.position_cosine, expected, rtol=1e-6)


def test_intervals_resample_photos():
    data = simulate()
    accumulator = accumulate(*data)
    scores = accumulator.scores()
    settings = {"replicates": 500, "confidence": 0.9, "seed": 3}
    metrics = accumulator.finish(bootstrap=500, confidence=0.9, seed=3)
    expected = estimate_means({"x": scores.token_cosine}, scores.sources, **settings)["x"]
    assert metrics.token_cosine == expected
    for name in ("image_cosine", "centred_cosine", "mse", "r2"):
        estimate = getattr(metrics, name)
        assert estimate.low < estimate.value < estimate.high
    assert accumulator.finish(bootstrap=0).r2.low is None


def test_batches_do_not_matter():
    data = simulate()
    one, many = accumulate(*data, batch=30), accumulate(*data, batch=4)
    for name in ("token_cosine", "image_cosine", "centred_cosine", "mse"):
        np.testing.assert_allclose(
            getattr(one.scores(), name), getattr(many.scores(), name), rtol=1e-6, atol=1e-7
        )
    assert one.finish(bootstrap=0).cka == pytest.approx(many.finish(bootstrap=0).cka, rel=1e-6)


def test_the_mean_predictor_scores_zero_where_it_should():
    _, target, mean, keys, sources = simulate()
    metrics = accumulate(mean.expand(30, N, C), target, mean, keys, sources).finish(bootstrap=50)
    assert metrics.r2.value == 0
    assert metrics.centred_cosine.value == 0
    assert metrics.cka == metrics.cka_debiased == 0
    assert metrics.recall_generated_to_target[1].value == pytest.approx(1 / 30)
    assert metrics.recall_target_to_generated[10].value == pytest.approx(10 / 30)
    assert metrics.token_cosine.value > 0.5


def test_a_perfect_answer_scores_one():
    _, target, mean, keys, sources = simulate()
    metrics = accumulate(target, target, mean, keys, sources).finish(bootstrap=0)
    for name in ("token_cosine", "image_cosine", "centred_cosine", "r2"):
        assert getattr(metrics, name).value == pytest.approx(1, abs=1e-6)
    assert metrics.mse.value == 0
    assert metrics.recall_target_to_generated[1].value == 1
    assert metrics.cka == pytest.approx(1)


@pytest.mark.parametrize(("samples", "recall_at"), [(1, []), (2, [1]), (6, [1, 5])])
def test_what_few_samples_cannot_say_is_left_out(samples, recall_at):
    generated, target, mean, keys, sources = simulate()
    few = [x[:samples] for x in (generated, target)]
    metrics = accumulate(*few, mean, keys[:samples], sources[:samples]).finish(bootstrap=0)
    assert list(metrics.recall_generated_to_target) == recall_at
    assert list(metrics.recall_target_to_generated) == recall_at
    assert (metrics.cka is None) == (metrics.energy_distance is None) == (samples == 1)


def test_cls_is_reported_apart():
    generated, target, mean, keys, sources = simulate(tokens=N + 1)
    whole = accumulate(generated, target, mean, keys, sources, has_cls=True).finish(bootstrap=50)
    patches = accumulate(generated[:, 1:], target[:, 1:], mean[1:], keys, sources).finish(
        bootstrap=50
    )
    assert patches.cls is None
    assert whole.cls is not None
    assert whole.token_cosine.value == pytest.approx(patches.token_cosine.value, rel=1e-6)
    assert whole.image_cosine.value == pytest.approx(patches.image_cosine.value, rel=1e-6)
    assert whole.r2.value == pytest.approx(patches.r2.value, rel=1e-6)
    assert len(whole.position_cosine) == N
    g, x, m = (u.double().numpy() for u in (generated[:, 0], target[:, 0], mean[0]))
    pairs = list(zip(g, x, strict=True))
    assert whole.cls.cosine.value == pytest.approx(np.mean([cosine(a, b) for a, b in pairs]))
    centred = np.mean([cosine(a - m, b - m) for a, b in pairs])
    assert whole.cls.centred_cosine.value == pytest.approx(centred, rel=1e-5)
    assert whole.cls.mse.value == pytest.approx(((g - x) ** 2).mean(), rel=1e-6)
    assert whole.to_dict()["cls"]["mse"]["value"] == whole.cls.mse.value


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_computed_wide(dtype):
    generated, target, mean, keys, sources = simulate()
    generated, target = generated.to(dtype), target.to(dtype)
    got = accumulate(generated, target, mean.to(dtype), keys, sources).scores()
    expected = expected_rows(generated, target, mean.to(dtype))
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(got, name), values, rtol=5e-6, atol=1e-6)


def test_one_mean_for_all_positions():
    generated, target, _, keys, sources = simulate()
    flat = torch.randn(C, generator=torch.Generator().manual_seed(1))
    got = accumulate(generated, target, flat, keys, sources).scores().centred_cosine
    expected = expected_rows(generated, target, flat.expand(N, C))["centred_cosine"]
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=1e-6)


def test_samples_without_sources_are_their_own_clusters():
    generated, target, mean, keys, _ = simulate()
    accumulator = MetricAccumulator(mean)
    accumulator.add(generated, target, keys)
    assert accumulator.finish(bootstrap=0).sources == 30
    assert accumulator.scores().sources == tuple(keys)


def test_to_dict_survives_json():
    metrics = accumulate(*simulate()).finish(bootstrap=50)
    record = metrics.to_dict()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["token_cosine"]["value"] == metrics.token_cosine.value
    assert record["image_cosine_above"]["0.7"]["low"] == metrics.image_cosine_above[0.7].low
    assert (
        record["recall_generated_to_target"]["5"]["value"]
        >= record["recall_generated_to_target"]["1"]["value"]
    )
    assert record["quantiles"]["mse"]["0.5"] == metrics.quantiles["mse"][0.5]
    assert record["resamples"] == 50


def test_token_cosines():
    generated, target, *_ = simulate(n=2)
    generated[1, 3] = 0
    got = token_cosines(generated, target)
    assert got.shape == (2, N)
    assert got[1, 3] == 0
    assert got[0, 2].item() == pytest.approx(cosine(generated[0, 2].numpy(), target[0, 2].numpy()))


def broken(name):
    generated, target, _, keys, sources = simulate(n=4)
    if name == "shape":
        target = target[:, :-1]
    elif name == "tokens":
        generated, target = generated[:, :4], target[:, :4]
    elif name == "empty":
        generated, target, keys, sources = generated[:0], target[:0], [], []
    elif name == "keys":
        keys = keys[:-1]
    elif name == "string":
        keys = "abcd"
    elif name == "sources":
        sources = sources[:-1]
    elif name == "repeated":
        keys = ["s0", "s1", "s2", "s0"]
    elif name == "seen":
        keys = ["s10", "s11", "s12", "old"]
    elif name == "nan":
        generated[2, 1, 0] = torch.nan
    elif name == "inf":
        target[1, 1, 0] = torch.inf
    return generated, target, keys, sources


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shape", r"target: expected shape \[B=4, N=6, C=10\], got \[4, 5, 10\]"),
        ("tokens", r"like the training mean's \[6, 10\], got \[N=4, C=10\]"),
        ("empty", r"expected samples with patches, got \[0, 6, 10\]"),
        ("keys", "keys: expected a list of 4 names, got 3"),
        ("string", "keys: expected a list of 4 names"),
        ("sources", "sources: expected a list of 4 names, got 3"),
        ("repeated", "keys: expected each sample once"),
        ("seen", "keys: expected each sample once, got 'old' again"),
        ("nan", "generated: expected finite numbers, got NaN or Inf in sample 's2'"),
        ("inf", "target: expected finite numbers, got NaN or Inf in sample 's1'"),
    ],
)
def test_bad_batches_are_refused_and_lose_nothing(name, message):
    generated, target, mean, _, _ = simulate(n=2, seed=5)
    accumulator = MetricAccumulator(mean)
    accumulator.add(generated, target, ["old", "older"])
    before = accumulator.finish(bootstrap=20)
    with pytest.raises(ValueError, match=message):
        accumulator.add(*broken(name))
    assert accumulator.finish(bootstrap=20) == before


def test_misuse_is_refused():
    with pytest.raises(ValueError, match=r"train_mean: expected \[N, C\] or \[C\]"):
        MetricAccumulator(torch.zeros(1, 2, 3))
    with pytest.raises(ValueError, match="train_mean: expected finite"):
        MetricAccumulator(torch.tensor([torch.nan]))
    accumulator = MetricAccumulator(torch.zeros(N, C))
    with pytest.raises(ValueError, match="expected at least one sample"):
        accumulator.finish()
    accumulator.add(torch.ones(1, N, C), torch.zeros(1, N, C), ["a"])
    with pytest.raises(ValueError, match="expected tokens that vary"):
        accumulator.finish()


def test_token_count_must_not_change():
    accumulator = MetricAccumulator(torch.zeros(C))
    accumulator.add(torch.ones(1, N, C), torch.ones(1, N, C), ["a"])
    with pytest.raises(ValueError, match="expected 6 tokens per sample as before, got 7"):
        accumulator.add(torch.ones(1, N + 1, C), torch.ones(1, N + 1, C), ["b"])


@pytest.mark.gpu
def test_tensors_on_a_device_give_the_same_numbers():
    generated, target, mean, keys, sources = data = simulate()
    accumulator = MetricAccumulator(mean)
    accumulator.add(generated.cuda(), target.cuda(), keys, sources)
    got, expected = accumulator.finish(bootstrap=20), accumulate(*data).finish(bootstrap=20)
    assert got.token_cosine.value == pytest.approx(expected.token_cosine.value, rel=1e-6)
    assert got.r2.value == pytest.approx(expected.r2.value, rel=1e-6)
