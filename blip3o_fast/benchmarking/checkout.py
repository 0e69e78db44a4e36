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

from blip3o_fast.benchmarking.environment import find_commit
from blip3o_fast.benchmarking.shapes import Shape
from blip3o_fast.benchmarking.watch import Call
from blip3o_fast.errors import OptionError
from blip3o_fast.pretrained import BLIP3oDiT

MODEL_FILE = "src/modules/models/blip3o_dit.py"


def check_checkout(checkout: Path) -> Path:
    """The file of the published model.

    Raises:
        OptionError: if the checkout does not hold it.
    """
    file = checkout / MODEL_FILE
    if not checkout.is_dir():
        raise OptionError(f"published: expected a folder, found none at {checkout}")
    if not file.is_file():
        raise OptionError(
            f"published: expected a checkout of the published implementation, with {MODEL_FILE} "
            f"in it; {checkout} has none"
        )
    return file


def describe_checkout(checkout: Path | None) -> str:
    """The commit of the published implementation, or ``absent: `` and the reason."""
    if checkout is None:
        return "absent: no checkout was named; --published FOLDER"
    commit, changed = find_commit(checkout.resolve())
    if commit is None:
        return "a copy without its history"
    return f"commit {commit[:12]}" + (", changed" if changed else "")


def open_checkout(checkout: Path | None, shape: Shape) -> Callable[[BLIP3oDiT], Call] | None:
    """A function from a model of ours to a call of the published one, on the same device.

    It has random weights of its own, since only its time is compared, and the published sizes with
    256 tokens. It cannot run with 16-bit weights, because its embedding of the time stays fp32. If
    ours has 16-bit weights, it therefore runs with fp32 weights under autocast, as its own
    evaluator does.

    Raises:
        OptionError: if the checkout does not hold the model.
    """
    if checkout is None:
        return None
    file = check_checkout(checkout)

    def make(model: BLIP3oDiT) -> Call:
        config, weight = model.config, model.input_proj.weight
        published = load_published(file, shape).to(weight.device)
        size = (shape.batch, shape.tokens)
        x = torch.randn(*size, config.clip_embedding_size, device=weight.device)
        eva = torch.randn(*size, config.eva_embedding_size, device=weight.device)
        times = torch.full((shape.batch,), 0.5, device=weight.device)
        narrow = weight.dtype != torch.float32
        kind, dtype = weight.device.type, weight.dtype if narrow else None

        def evaluate() -> object:
            with torch.no_grad(), torch.autocast(kind, dtype=dtype, enabled=narrow):
                return published(x, times, eva, return_dict=False)

        return evaluate

    return make


def load_published(file: Path, shape: Shape, num_hidden_layers: int | None = None) -> nn.Module:
    """The published model in evaluation mode. Weights that start at zero are made random.

    ``num_hidden_layers`` None is that of the preset.
    """
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
        changes = {} if num_hidden_layers is None else {"num_hidden_layers": num_hidden_layers}
        model = make(model_size=shape.preset, **changes).eval()
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
