"""blip3o_fast: EVA-CLIP patch embeddings to CLIP patch embeddings by rectified flow."""

import sys
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Importing the package registers the ops, which exported models need. In the program blip3o-fast
# nobody waits for them: its help and refusals need no torch, and a command imports what it uses.
if TYPE_CHECKING or PurePath(*sys.argv[:1]).name not in ("blip3o-fast", "blip3o-fast.exe"):
    from blip3o_fast.config import PRESETS, DiTConfig
    from blip3o_fast.flow import FittedSolver, RectifiedFlowLoss
    from blip3o_fast.pretrained import BLIP3oDiT, load_trained_model
    from blip3o_fast.published import (
        BLIP3oCLIPDiTConfig,
        BLIP3oCLIPDiTModel,
        ImprovedBLIP3oCLIPDiTModel,
        accelerate,
        create_clip_reproduction_model,
        create_improved_clip_reproduction_model,
    )
    from blip3o_fast.sampling import SamplingPlan, fit_solver, forget

    generate = BLIP3oDiT.generate
    """``generate(model, eva_features, ...)`` is ``model.generate(eva_features, ...)``."""

if TYPE_CHECKING:
    from blip3o_fast.extraction import extract_eva_features

__all__ = [
    "BLIP3oDiT",
    "DiTConfig",
    "PRESETS",
    "generate",
    "SamplingPlan",
    "fit_solver",
    "FittedSolver",
    "forget",
    "RectifiedFlowLoss",
    "load_trained_model",
    "extract_eva_features",
    "accelerate",
    "BLIP3oCLIPDiTModel",
    "BLIP3oCLIPDiTConfig",
    "create_clip_reproduction_model",
    "ImprovedBLIP3oCLIPDiTModel",
    "create_improved_clip_reproduction_model",
]


def __getattr__(name: str) -> Any:
    """Import extraction, which few programs need, when it is first asked for."""
    if name == "extract_eva_features":
        from blip3o_fast.extraction import extract_eva_features

        return extract_eva_features
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
