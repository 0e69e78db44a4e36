"""How many samples go through the sampler together.

Samples are cut into micro-batches so that what one needs beside weights, inputs and outputs stays
below a working memory: 1 GiB on a CPU; on CUDA the size of the L2 cache, so that a row kernel finds
what the GEMM before it wrote. The figures below are upper bounds per sample, by the widths alive at
once, in a dtype of activations: bf16 for FP8, whose rows are narrower still, and fp32 where FP8 is
emulated, which then also copies one weight at a time to fp32.
"""

import torch

from blip3o_fast.config import DiTConfig

CPU_WORKING_MEMORY = 1 << 30
LARGEST_MICRO_BATCH = 128
SMALLEST_ON_CUDA = 8
"""A micro-batch reads every weight once: 8 samples (2,048 rows) give each byte work enough."""


def micro_batch(
    config: DiTConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    guided: bool,
    working_memory: int | None,
) -> int:
    """Samples whose working memory fits, from 1 to 128."""
    evaluation = evaluation_bytes(config, dtype) * (2 if guided else 1)
    if device.type == "cuda" and working_memory is None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        return min(LARGEST_MICRO_BATCH, max(SMALLEST_ON_CUDA, cache // evaluation))
    budget = CPU_WORKING_MEMORY if working_memory is None else working_memory
    needed = (
        max(evaluation, conditioning_bytes(config, dtype))
        + state_bytes(config)
        + context_bytes(config, dtype) * (2 if guided else 1)
    )
    return min(LARGEST_MICRO_BATCH, max(1, budget // needed))


def evaluation_bytes(config: DiTConfig, dtype: torch.dtype) -> int:
    """Activations of one sample in the widest part of a block, row ops in fp32."""
    D, inner = config.hidden_size, config.intermediate_size
    wide = torch.promote_types(dtype, torch.float32).itemsize
    stream = 3 * D * dtype.itemsize
    mlp = 5 * inner * dtype.itemsize
    rows = 5 * D * wide
    attention = 8 * D * dtype.itemsize
    return config.num_tokens * (stream + max(mlp, rows, attention))


def conditioning_bytes(config: DiTConfig, dtype: torch.dtype) -> int:
    """Activations of one sample in the first layer of the adapter."""
    E = config.eva_embedding_size
    return config.num_tokens * E * dtype.itemsize * 5 + 2 * context_bytes(config, dtype)


def context_bytes(config: DiTConfig, dtype: torch.dtype) -> int:
    """Keys and values of one sample in every layer, and its part of the stream."""
    width = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    width += config.hidden_size
    return config.num_tokens * width * dtype.itemsize


def state_bytes(config: DiTConfig) -> int:
    """The fp32 state of one sample, and what a solver step keeps beside it."""
    return 8 * config.num_tokens * config.clip_embedding_size * 4
