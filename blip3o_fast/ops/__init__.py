"""The fused ops: one file each, a public function over interchangeable implementations."""

from blip3o_fast.ops._attention_backends import AttentionBackend
from blip3o_fast.ops._cuda import CudaBuild, cuda_build
from blip3o_fast.ops._dispatch import Impl, prefer_eager
from blip3o_fast.ops._record import Op
from blip3o_fast.ops._registration import OPS, resolve_impl
from blip3o_fast.ops._specimens import Sizes
from blip3o_fast.ops._table import ImplTable
from blip3o_fast.ops.adapter_mix import adapter_mix
from blip3o_fast.ops.adapter_norm import adapter_norm
from blip3o_fast.ops.attention import attention, attention_backend
from blip3o_fast.ops.flow_loss import flow_loss
from blip3o_fast.ops.gemm_swiglu import gemm_swiglu
from blip3o_fast.ops.quantised import (
    e4m3_refusal,
    sandwich_join_quantised,
    sandwich_norm_quantised,
    scaled_linear,
    swiglu_quantised,
)
from blip3o_fast.ops.rope import rope
from blip3o_fast.ops.rope_attention import rope_attention
from blip3o_fast.ops.sandwich_join import sandwich_join
from blip3o_fast.ops.sandwich_norm import sandwich_norm
from blip3o_fast.ops.solver_update import solver_update
from blip3o_fast.ops.swiglu import swiglu
from blip3o_fast.reference import LossTerms, LossWeights, Modulation, Quantised, quantise_rows

__all__ = [
    "Impl",
    "ImplTable",
    "resolve_impl",
    "prefer_eager",
    "CudaBuild",
    "cuda_build",
    "Op",
    "OPS",
    "Sizes",
    "Modulation",
    "LossTerms",
    "LossWeights",
    "sandwich_norm",
    "sandwich_join",
    "rope",
    "swiglu",
    "gemm_swiglu",
    "AttentionBackend",
    "attention",
    "attention_backend",
    "rope_attention",
    "adapter_norm",
    "adapter_mix",
    "solver_update",
    "flow_loss",
    "Quantised",
    "quantise_rows",
    "e4m3_refusal",
    "scaled_linear",
    "sandwich_norm_quantised",
    "sandwich_join_quantised",
    "swiglu_quantised",
]
