"""Every tensor is made on the device asked for, whatever torch's default device is.

The default device of these tests is ``meta``. A tensor that is made on it by mistake has no values,
so whatever reads it fails or differs; a tensor of a module that is not made on it shows in a walk.
``tests/rehearsal`` walks the same modules on a GPU that is not there.
"""

import importlib
import pkgutil

import pytest
import torch
from small_data import E, N, small_model, write_shards
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import blip3o_fast
from blip3o_fast import SamplingPlan
from blip3o_fast.data import EmbeddingDataset
from blip3o_fast.data.loader import Loader
from blip3o_fast.evaluation import EvaluationSettings, evaluate_model
from blip3o_fast.training import train
from tests.modules import MODELS, tensors_of
from tests.training.runs import assert_equal_runs, small_options


@pytest.mark.parametrize("where", ["cpu", "meta"])
@pytest.mark.parametrize("name", MODELS)
def test_models_are_made_on_the_default_device(name, where):
    with FakeTensorMode(), torch.device(where):
        model = MODELS[name]()
    found = {key: x.device.type for key, x in tensors_of(model)}
    assert found and {key: kind for key, kind in found.items() if kind != where} == {}


def test_the_walk_meets_every_module():
    with torch.device("meta"):
        met = {type(part) for make in MODELS.values() for part in make().modules()}
    for found in pkgutil.walk_packages(blip3o_fast.__path__, "blip3o_fast."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
    ours = {kind for kind in subclasses(nn.Module) if kind.__module__.startswith("blip3o_fast.")}
    missing = {kind.__qualname__ for kind in ours if not any(issubclass(m, kind) for m in met)}
    assert missing == {"CLIPVisionTower", "BLIP3oCLIPDiTModel"}  # modules of others; BLIP3oDiT


def subclasses(kind):
    for child in kind.__subclasses__():
        yield child
        yield from subclasses(child)


@pytest.mark.parametrize("solver", ["heun", "adams_bashforth2"])
@pytest.mark.parametrize("seeded", [{"seeds": [3, 4]}, {"generator": 5}, {"noise": None}])
def test_a_plan_heeds_its_inputs_alone(solver, seeded):
    model = small_model(condition_dropout=0.1)
    eva = torch.randn(2, N, E, generator=torch.Generator().manual_seed(0))

    def sample():
        torch.manual_seed(1)
        given = dict(seeded)
        if "generator" in given:
            given["generator"] = torch.Generator().manual_seed(given["generator"])
        plan = SamplingPlan(model, steps=3, solver=solver, guidance_scale=2.0)
        return plan(eva, **given)

    expected = sample()
    with torch.device("meta"):
        got = sample()
    assert torch.equal(got, expected)


def test_training_heeds_its_options_alone(tmp_path):
    shards = write_shards(tmp_path / "shards")

    def run(name):
        options = {"chunked_embeddings_dir": shards, "output_dir": tmp_path / name}
        train(small_options(**options, ema_decay=0.9, adaptive_grad_clipping=True))
        return tmp_path / name

    expected = run("plain")
    with torch.device("meta"):
        got = run("poisoned")
    assert_equal_runs(got, expected)


def test_evaluation_and_loader_heed_their_inputs_alone(tmp_path):
    folder = write_shards(tmp_path / "shards", 40, photos=20)
    model = small_model()
    settings = EvaluationSettings(evaluations=(1, 2), bootstrap=50, photos=2)

    def measured():
        training, heldout = (EmbeddingDataset(folder, split=side) for side in ("train", "heldout"))
        with Loader(training, batch_size=4, seed=0) as loader:
            batch = next(loader)
        return batch, evaluate_model(model, training, heldout, settings, progress=False)

    batch, report = measured()
    with torch.device("meta"):
        poisoned_batch, poisoned = measured()
    assert torch.equal(poisoned_batch.eva, batch.eva)
    assert torch.equal(poisoned_batch.clip, batch.clip)
    assert [r.metrics for r in poisoned.dit] == [r.metrics for r in report.dit]
    assert poisoned.mean.metrics == report.mean.metrics
    assert poisoned.ridge.metrics == report.ridge.metrics
