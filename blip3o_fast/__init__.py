"""blip3o_fast: EVA-CLIP patch embeddings to CLIP patch embeddings by rectified flow."""

from blip3o_fast.config import PRESETS, DiTConfig
from blip3o_fast.flow import RectifiedFlowLoss
from blip3o_fast.pretrained import BLIP3oDiT, load_trained_model
from blip3o_fast.published import (
    BLIP3oCLIPDiTConfig,
    BLIP3oCLIPDiTModel,
    accelerate,
    create_clip_reproduction_model,
)
from blip3o_fast.sampling import SamplingPlan, generate

__version__ = "0.1.0"

__all__ = [
    "BLIP3oDiT",
    "DiTConfig",
    "PRESETS",
    "generate",
    "SamplingPlan",
    "RectifiedFlowLoss",
    "load_trained_model",
    "accelerate",
    "BLIP3oCLIPDiTModel",
    "BLIP3oCLIPDiTConfig",
    "create_clip_reproduction_model",
]
