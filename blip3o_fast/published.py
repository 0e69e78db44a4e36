"""The published module's names, as a drop-in import.

    from blip3o_fast import BLIP3oCLIPDiTModel, BLIP3oCLIPDiTConfig, create_clip_reproduction_model

They are the library's own model with ``conventions="published"``. They have the published
constructor fields, signatures of ``forward`` and ``generate``, and state-dict keys. From the same
noise they give the published outputs up to fp32 rounding. ``docs/drop-in.md`` lists
what is supported.
"""

import inspect
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from blip3o_fast.atomic import write_atomically
from blip3o_fast.checked import read_json
from blip3o_fast.checkpoint import CONFIG_NAME, check_tensors, published_names
from blip3o_fast.config import DiTConfig, Size, TrainingMode
from blip3o_fast.devices import no_values
from blip3o_fast.pretrained import BLIP3oDiT
from blip3o_fast.sampling import PlanOptions


@dataclass(unsafe_hash=True)
class BLIP3oCLIPDiTConfig(DiTConfig):
    """``DiTConfig`` that follows the published conventions unless told otherwise."""

    conventions: Literal["consistent", "published"] = "published"

    model_type: ClassVar[str] = "blip3o_clip_dit"

    @property
    def grid_size(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    def to_json_string(self) -> str:
        """The text of ``config.json``."""
        return json.dumps(self.to_dict() | {"model_type": self.model_type}, indent=2) + "\n"

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` into ``folder``, which is made if need be."""
        path = Path(folder) / CONFIG_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, self.to_json_string().encode())

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "BLIP3oCLIPDiTConfig":
        """Read the ``config.json`` in ``folder``."""
        return cls.from_dict(read_json(Path(folder) / CONFIG_NAME))


class BLIP3oCLIPDiTModel(BLIP3oDiT):
    """The published model class. ``config`` may also be an instance of the published one.

    Like the published methods, ``forward`` and ``generate`` take keywords that they do not know;
    each such name is warned of once.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(_own_config(config))

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        return_dict: bool = True,
        **ignored: Any,
    ) -> dict[str, Tensor] | Tensor:
        """``DiT.forward``; ``timestep`` may also be ``[1]``, one time for all samples."""
        _warn_of("forward", ignored)
        if timestep.shape == (1,):
            timestep = timestep.expand(len(hidden_states))
        return super().forward(hidden_states, timestep, encoder_hidden_states, return_dict)

    def generate(
        self,
        eva_features: Tensor,
        num_inference_steps: int = 50,
        use_heun: bool = True,
        guidance_scale: float = 1.0,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Tensor:
        """``BLIP3oDiT.generate``, with the same options."""
        known = {name: options.pop(name) for name in [*options] if name in _OPTIONS}
        _warn_of("generate", options)
        return super().generate(
            eva_features, num_inference_steps, use_heun, guidance_scale, generator, **known
        )

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether blocks are recomputed in the backward pass."""
        return self.gradient_checkpointing

    def num_parameters(self, only_trainable: bool = False) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)


_OPTIONS = frozenset(
    (*inspect.signature(BLIP3oDiT.generate).parameters, *PlanOptions.__annotations__)
)
"""Keywords that ``generate`` knows."""

_WARNED: set[tuple[str, str]] = set()


def _warn_of(method: str, ignored: dict[str, Any]) -> None:
    for name in ignored:
        if (method, name) not in _WARNED:
            _WARNED.add((method, name))
            warnings.warn(f"{method}: ignores {name!r}, as the published one does", stacklevel=3)


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


ImprovedBLIP3oCLIPDiTModel = BLIP3oCLIPDiTModel
create_improved_clip_reproduction_model = create_clip_reproduction_model
"""The published module has two names for each."""


def accelerate(model: nn.Module) -> BLIP3oCLIPDiTModel:
    """A fast model that shares the parameters of an instance of the published one.

    Nothing is copied, so training one of them changes both. Device, dtype and mode are kept.

    Raises:
        TypeError: if ``model`` has no published configuration.
        ValueError: if its parameters do not fit that configuration.
    """
    config = _own_config(getattr(model, "config", None))
    tensors = published_names(dict(model.named_parameters()))
    with no_values():
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
