"""The network against recorded outputs of the published implementation."""

import json

import pytest
import torch
from golden_data import GOLDEN, MODELS, load_golden, relative_error

from blip3o_fast import BLIP3oDiT, DiTConfig
from blip3o_fast.model import DiT


@pytest.fixture(params=MODELS)
def golden(request):
    return load_golden(request.param)


@pytest.fixture
def model(golden):
    model = BLIP3oDiT(DiTConfig.from_dict(golden.config)).eval()
    model.load_state_dict(golden.weights)
    return model


def test_forward(golden, model):
    with torch.no_grad():
        out = model(golden.tensors["x"], golden.tensors["t"], golden.tensors["eva"])
    assert relative_error(out["velocity_prediction"], golden.tensors["velocity"]) < 1e-5
    assert relative_error(out["hidden_states"], golden.tensors["hidden"]) < 1e-5


@pytest.mark.parametrize("solver", ["heun", "euler"])
@pytest.mark.parametrize("guidance", [1, 2])
@pytest.mark.filterwarnings("ignore:guidance_scale")
def test_generate(golden, model, solver, guidance):
    out = model.generate(
        golden.tensors["eva"],
        golden.steps,
        use_heun=solver == "heun",
        guidance_scale=float(guidance),
        noise=golden.tensors["noise"],
    )
    expected = golden.tensors[f"generate.{solver}.guidance{guidance}"]
    assert relative_error(out, expected) < 1e-5


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
def test_state_dict_of_presets(size):
    with torch.device("meta"):
        model = DiT(DiTConfig.preset(size))
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == json.loads((GOLDEN / "state_dict_shapes.json").read_text())[size]


@pytest.mark.parametrize(
    ("size", "parameters"),
    [("tiny", 61_881_502), ("small", 98_781_662), ("base", 227_474_014), ("large", 684_276_224)],
)
def test_parameter_counts(size, parameters):
    with torch.device("meta"):
        assert DiT(DiTConfig.preset(size)).get_num_parameters() == parameters
