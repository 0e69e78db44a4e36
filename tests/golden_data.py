"""Reader of the recorded outputs in tests/golden."""

import json
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
MODELS = (
    *("sandwich_rope", "prenorm_rope", "sandwich_posembed", "linear_adapter", "head_dim_64"),
    *("cls_patch_posembed", "rms_norm_eps"),
)


class Golden(NamedTuple):
    config: dict
    steps: int
    weights: dict[str, Tensor]
    tensors: dict[str, Tensor]


def load_golden(name: str) -> Golden:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
    weights = {
        k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")
    }
    return Golden(
        json.loads(metadata["config"]), int(metadata["num_inference_steps"]), weights, tensors
    )


def relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()
