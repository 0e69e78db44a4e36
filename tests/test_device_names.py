"""Names of devices."""

import pytest
import torch

from blip3o_fast.devices import find_device
from blip3o_fast.errors import OptionError


@pytest.mark.parametrize(
    ("name", "gpus", "device"),
    [
        ("auto", 0, "cpu"),
        ("auto", 2, "cuda"),
        ("cpu", 2, "cpu"),
        ("cuda", 1, "cuda"),
        ("cuda:1", 2, "cuda:1"),
    ],
)
def test_names(name, gpus, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert find_device(name) == torch.device(device)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda", "clip_device: expected one of the 0 CUDA devices that torch finds, got 'cuda'"),
        (
            "cuda:1",
            "clip_device: expected one of the 0 CUDA devices that torch finds, got 'cuda:1'",
        ),
        ("gpu", "clip_device: expected auto, cpu, cuda or cuda:N, got 'gpu'"),
    ],
)
def test_a_device_that_is_not_there_is_refused_by_option(name, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(OptionError) as error:
        find_device(name, "clip_device")
    assert str(error.value) == message
