"""The average of the weights: its recursion, its exchange, its place in checkpoints."""

import pytest
import torch
from small_data import small_model

from blip3o_fast import load_trained_model
from blip3o_fast.training import train
from blip3o_fast.training.ema import WeightAverage


def test_recursion_with_its_ramp():
    model = small_model()
    average = WeightAverage(model, 0.5)
    expected = {name: p.detach().double() for name, p in model.named_parameters()}
    for update in range(12):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        average.update()
        d = min(0.5, (1 + update) / (10 + update))
        for name, p in model.named_parameters():
            expected[name] = d * expected[name] + (1 - d) * p.detach().double()
    assert average.updates == 12
    for name, value in expected.items():
        torch.testing.assert_close(average.averages[name].double(), value, rtol=1e-5, atol=1e-5)


def test_exchange_is_undone_even_by_an_error():
    model = small_model()
    average = WeightAverage(model, 0.9)
    with torch.no_grad():
        model.input_proj.weight.add_(1)
    raw = model.input_proj.weight.detach().clone()
    address = model.input_proj.weight.data_ptr()
    with pytest.raises(RuntimeError), average.applied():
        assert not torch.equal(model.input_proj.weight, raw)
        raise RuntimeError
    assert torch.equal(model.input_proj.weight, raw)
    assert model.input_proj.weight.data_ptr() == address


def test_checkpoints_hold_the_averages_and_the_raw_weights(options):
    result = train(options(ema_decay=0.9))
    folder = result.folder / "step_6"
    usable = load_trained_model(folder).state_dict()
    saved = torch.load(folder / "trainer.pt", weights_only=True)
    assert saved["average_updates"] == 6
    assert saved["weights"].keys() == usable.keys()
    assert not torch.equal(saved["weights"]["input_proj.weight"], usable["input_proj.weight"])


def test_averaging_does_not_disturb_training(options, tmp_path):
    plain = train(options())
    averaged = train(options(ema_decay=0.9, output_dir=tmp_path / "other"))
    assert plain.losses == averaged.losses
