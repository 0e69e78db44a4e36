"""The published module's names, as a drop-in import.

    from blip3o_fast import BLIP3oCLIPDiTModel, BLIP3oCLIPDiTConfig, create_clip_reproduction_model

They are the library's own model with ``conventions="published"``. They have the published
constructor fields, signatures of ``forward`` and ``generate``, and state-dict keys. From the same
noise they give the published outputs up to fp32 rounding.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from blip3o_fast.checkpoint import check_tensors, published_names
from blip3o_fast.config import DiTConfig, Size, TrainingMode
from blip3o_fast.pretrained import BLIP3oDiT


@dataclass(unsafe_hash=True)
class BLIP3oCLIPDiTConfig(DiTConfig):
    """``DiTConfig`` that follows the published conventions unless told otherwise."""

    conventions: Literal["consistent", "published"] = "published"


class BLIP3oCLIPDiTModel(BLIP3oDiT):
    """The published model class. ``config`` may also be an instance of the published one."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(_own_config(config))


def create_clip_reproduction_model(
    config: DiTConfig | None = None,
    training_mode: TrainingMode = "patch_only",
    model_size: Size = "base",
    use_3d_rope: bool = True,
    use_sandwich_norm: bool = True,
    use_eva_adapter: bool = True,
    eva_adapter_layers: int = 6,
    layer_scale_init_value: float = 0.1,
    **config_overrides: Any,
) -> BLIP3oCLIPDiTModel:
    """The published factory: a preset with switches, or a ready configuration.

    ``config_overrides`` are fields of ``BLIP3oCLIPDiTConfig``; an unknown one raises
    ``ValueError``.
    """
    if config is None:
        fields = {
            "training_mode": training_mode,
            "use_3d_rope": use_3d_rope,
            "use_sandwich_norm": use_sandwich_norm,
            "use_eva_adapter": use_eva_adapter,
            "eva_adapter_layers": eva_adapter_layers,
            "layer_scale_init_value": layer_scale_init_value,
            **config_overrides,
        }
        config = BLIP3oCLIPDiTConfig.preset(model_size, **fields)
    return BLIP3oCLIPDiTModel(config)


def accelerate(model: nn.Module) -> BLIP3oCLIPDiTModel:
    """A fast model that shares the parameters of an instance of the published one.

    Nothing is copied, so training one of them changes both. Device, dtype and mode are kept.

    Raises:
        TypeError: if ``model`` has no published configuration.
        ValueError: if its parameters do not fit that configuration.
    """
    config = _own_config(getattr(model, "config", None))
    tensors = published_names(dict(model.named_parameters()))
    with torch.device("meta"):
        fast = BLIP3oCLIPDiTModel(config)
    check_tensors(config, fast.state_dict(), tensors)
    fast.load_state_dict(tensors, assign=True)
    device = next(iter(tensors.values())).device
    fast.rotary.to_empty(device=device)
    return fast.train(model.training)


def _own_config(config: object) -> DiTConfig:
    """``config`` itself, or one with the fields of an instance of the published class."""
    if isinstance(config, DiTConfig):
        return config
    names = DiTConfig.__dataclass_fields__
    fields = {name: getattr(config, name) for name in names if hasattr(config, name)}
    if "hidden_size" not in fields or "eva_embedding_size" not in fields:
        raise TypeError(
            "expected a BLIP3oCLIPDiTConfig or a model that has one, "
            f"got {type(config).__name__} without hidden_size and eva_embedding_size"
        )
    return BLIP3oCLIPDiTConfig(**fields)
