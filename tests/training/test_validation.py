"""Validation: the report's metrics on held-out samples, the same ones every time."""

import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from rounding import rounding_bound

from blip3o_fast.data import EmbeddingDataset
from blip3o_fast.processes import World
from blip3o_fast.sampling import cache
from blip3o_fast.training import train
from blip3o_fast.training.run import SUMMARY_NAME
from blip3o_fast.training.run_page import REPORT_NAME
from blip3o_fast.training.run_plan import make_plan
from blip3o_fast.training.tracking import METRICS_NAME
from blip3o_fast.training.trainer import build_model
from blip3o_fast.training.validation import Validation, Validator, heldout_sample, similarities


@pytest.fixture
def plan(options):
    return make_plan(options(eval_num_samples=50), World())


def test_metrics_equal_their_definitions():
    torch.manual_seed(0)
    a, b = torch.randn(3, 5, 4), torch.randn(3, 5, 4)
    scores = similarities(a, b)
    token = F.cosine_similarity(a.double(), b.double(), dim=-1).mean(1)
    image = F.cosine_similarity(a.double().mean(1), b.double().mean(1), dim=-1)
    error = (a.double() - b.double()).square().mean((1, 2))
    limit = rounding_bound(torch.float32, 20 + 10)  # the longest sum, and what surrounds it
    for got, expected in zip(scores.T, (token, image, error), strict=False):
        torch.testing.assert_close(got, expected, rtol=limit, atol=limit)
    assert torch.equal(similarities(a, a)[:, 3:], torch.ones(3, 3, dtype=torch.float64))


def test_the_perfect_sampler_scores_one(plan, monkeypatch):
    model = build_model(plan)
    truth = {
        batch.eva.sum().item(): batch
        for batch in map(plan.heldout.read, ([i] for i in range(len(plan.heldout))))
    }
    monkeypatch.setattr(
        model,
        "generate",
        lambda eva_features, **_: torch.cat([truth[e.sum().item()].clip for e in eva_features]),
    )
    result = Validator(plan, World()).run(model, 7)
    assert (result.step, result.samples) == (7, len(plan.heldout))
    assert result.token_cosine == pytest.approx(1) and result.image_cosine == pytest.approx(1)
    assert result.mse == 0 and result.above == (1.0, 1.0, 1.0)


def test_what_is_not_finite_is_never_best(options, monkeypatch):
    """The first validation diverges, the second is the best, the third diverges again."""
    run = Validator.run
    values = iter([math.nan, 0.5, math.inf])

    def spoilt(self, *args):
        result = run(self, *args)
        return result and dataclasses.replace(result, token_cosine=next(values), mse=math.inf)

    monkeypatch.setattr(Validator, "run", spoilt)
    result = train(options(max_steps=9, eval_every_n_steps=3))
    assert (result.best.step, result.best.token_cosine) == (6, 0.5)
    assert (result.folder / "best").read_text() == "step_6\n"

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    lines = (result.folder / METRICS_NAME).read_text().splitlines()
    records = [json.loads(line, parse_constant=refuse) for line in lines]
    validations = [record for record in records if record["kind"] == "validation"]
    assert [record["token_cosine"] for record in validations] == [None, 0.5, None]
    summary = json.loads((result.folder / SUMMARY_NAME).read_text(), parse_constant=refuse)
    assert summary["best"]["mse"] is None
    assert "none" in (result.folder / REPORT_NAME).read_text()


def test_a_model_that_diverged_is_validated_as_such(plan):
    model = build_model(plan)
    with torch.no_grad():
        model.output_proj.bias.fill_(math.nan)
    result = Validator(plan, World()).run(model, 7)
    assert math.isnan(result.token_cosine) and math.isnan(result.mse)


def test_samples_are_held_out_and_spread(plan, shards):
    heldout = EmbeddingDataset(shards, split="heldout")
    training = EmbeddingDataset(shards, split="train")
    chosen = heldout_sample(plan.heldout, 5)
    assert len(set(chosen)) == min(5, len(heldout)) and chosen == heldout_sample(plan.heldout, 5)
    trained = {record.photo for record in training.records(range(len(training)))}
    assert trained.isdisjoint(record.photo for record in heldout.records(chosen))


def test_it_repeats_itself_and_disturbs_nothing(plan):
    model = build_model(plan)
    validator = Validator(plan, World())
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = validator.run(model, 1)
    assert torch.equal(before, torch.get_rng_state())
    assert model.training
    torch.manual_seed(2)
    second = validator.run(model, 1)
    assert first.to_dict() | {"seconds": 0} == second.to_dict() | {"seconds": 0}


@pytest.mark.parametrize("size", [1, 3, 50])
def test_cutting_the_samples_changes_nothing_but_rounding(options, size):
    plan = make_plan(options(eval_num_samples=50, eval_batch_size=size), World())
    result = Validator(plan, World()).run(build_model(plan), 1)
    whole = make_plan(options(eval_num_samples=50, eval_batch_size=7), World())
    other = Validator(whole, World()).run(build_model(whole), 1)
    for name in ("loss", "token_cosine", "image_cosine", "mse"):
        assert getattr(result, name) == pytest.approx(getattr(other, name), rel=1e-4)


def test_nothing_of_the_sampler_is_kept(plan):
    model = build_model(plan)
    Validator(plan, World()).run(model, 1)
    assert model not in cache._ENGINES


def test_a_signal_ends_it_early(plan):
    assert Validator(plan, World()).run(build_model(plan), 1, lambda: True) is None


def test_json_round_trip():
    result = Validation(3, 4, 0.5, 0.6, 0.7, 0.8, (1.0, 0.5, 0.0), 2.0)
    assert Validation.from_dict(result.to_dict()) == result
