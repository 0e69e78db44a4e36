"""The published implementation as a peer, from a checkout of its repository."""

import importlib.util
import logging
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from blip3o_fast.benchmarking.clock import Call
from blip3o_fast.benchmarking.shapes import Shape
from blip3o_fast.errors import OptionError
from blip3o_fast.pretrained import BLIP3oDiT

MODEL_FILE = "src/modules/models/blip3o_dit.py"


def check_checkout(checkout: Path) -> Path:
    """The file of the published model.

    Raises:
        OptionError: if the checkout does not hold it.
    """
    file = checkout / MODEL_FILE
    if not file.is_file():
        raise OptionError(f"published: expected {MODEL_FILE} in {checkout}, found none")
    return file


def open_checkout(checkout: Path | None, shape: Shape) -> Callable[[BLIP3oDiT], Call] | None:
    """What makes, of a model of ours, an evaluation of the published one with random weights.

    Its weights are its own: only time is compared. It has the published sizes with 256 tokens and
    runs in the dtype and on the device of the given model.

    Raises:
        OptionError: if the checkout does not hold the model.
    """
    if checkout is None:
        return None
    file = check_checkout(checkout)

    def make(model: BLIP3oDiT) -> Call:
        config, weight = model.config, model.input_proj.weight
        published = load_published(file, shape).to(weight.device, weight.dtype)
        size = (shape.batch, shape.tokens)
        options: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        x = torch.randn(*size, config.clip_embedding_size, **options)
        eva = torch.randn(*size, config.eva_embedding_size, **options)
        times = torch.full((shape.batch,), 0.5, **options)

        def evaluate() -> object:
            with torch.no_grad():
                return published(x, times, eva, return_dict=False)

        return evaluate

    return make


def load_published(file: Path, shape: Shape) -> nn.Module:
    """The published model in evaluation mode, its zero-initialised weights made random."""
    if importlib.util.find_spec("transformers") is None:
        sys.modules.setdefault("transformers", _transformers_stub())
    spec = importlib.util.spec_from_file_location("published_blip3o_dit", file)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    level = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        spec.loader.exec_module(module)
        make = module.create_improved_clip_reproduction_model
        model = make(model_size=shape.preset).eval()
    finally:
        logging.disable(level)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model


def _transformers_stub() -> types.ModuleType:
    """The two names that the published module imports from transformers."""

    class PretrainedConfig:
        def __init__(self, **fields: Any) -> None:
            vars(self).update(fields)

    class PreTrainedModel(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.config = config

    stub: Any = types.ModuleType("transformers")
    stub.PretrainedConfig, stub.PreTrainedModel = PretrainedConfig, PreTrainedModel
    return stub
