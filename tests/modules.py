"""Every module of the library, to be made somewhere, and the tensors on it."""

from collections.abc import Iterator

from small_data import small_config
from torch import Tensor, nn

from blip3o_fast import BLIP3oDiT
from blip3o_fast.extraction.efficientnet import EfficientNetLite
from blip3o_fast.extraction.eva import EVAVisionConfig, EVAVisionTower

MODELS = {
    "consistent": lambda: BLIP3oDiT(small_config()),
    "published": lambda: BLIP3oDiT(small_config(conventions="published", use_sandwich_norm=False)),
    "one axis": lambda: BLIP3oDiT(small_config(use_3d_rope=False, use_eva_adapter=False)),
    "eva tower": lambda: EVAVisionTower(EVAVisionConfig(8, 8, 1, 1, image_size=28)),
    "efficientnet": lambda: EfficientNetLite(1.0, 1.0),
}
"""What makes every module of the library between them."""


def tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers and tensors that hang on a module otherwise, by name."""
    for name, part in module.named_modules():
        for key, value in (*vars(part).items(), *part._parameters.items(), *part._buffers.items()):
            if isinstance(value, Tensor):
                yield f"{name}.{key}", value
