"""Micro-batches: how many samples the sampler computes together, and the walk over all samples.

A micro-batch is so small that all it holds fits in a working memory: 1 GiB on a CPU, 4 GiB on CUDA,
or what the caller says. With ``"L2"`` its activations fit in the L2 cache of the GPU instead, so
that a row kernel could find in cache what the GEMM before it wrote. Nobody has measured yet whether
that pays. The functions below give upper bounds for one sample, from the widths that are alive at
once and the dtype of activations. For FP8 that is bf16, although some rows are narrower. Where FP8
is emulated it is fp32; then one weight at a time is also copied to fp32.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from blip3o_fast.config import DiTConfig
from blip3o_fast.flow import Callback, Trajectory
from blip3o_fast.pieces import even_slices
from blip3o_fast.progress import Progress
from blip3o_fast.sampling.graph import GraphRun

CPU_WORKING_MEMORY = 1 << 30
CUDA_WORKING_MEMORY = 4 << 30
LARGEST_MICRO_BATCH = 128
SMALLEST_IN_CACHE = 8
"""A micro-batch reads every weight once. 8 samples (2,048 rows) do enough work for each byte."""

WorkingMemory = int | Literal["L2"]


def micro_batch(
    config: DiTConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    guided: bool,
    working_memory: WorkingMemory | None,
) -> int:
    """How many samples fit in the working memory, from 1 to 128.

    Raises:
        ValueError: for less than a byte, or for ``"L2"`` without a GPU.
    """
    evaluation = evaluation_bytes(config, dtype) * (2 if guided else 1)
    if working_memory == "L2":
        if device.type != "cuda":
            raise ValueError(f'working_memory: "L2" needs a CUDA device, got {device}')
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        return min(LARGEST_MICRO_BATCH, max(SMALLEST_IN_CACHE, cache // evaluation))
    usual = CUDA_WORKING_MEMORY if device.type == "cuda" else CPU_WORKING_MEMORY
    budget = usual if working_memory is None else working_memory
    needed = (
        max(evaluation, conditioning_bytes(config, dtype))
        + state_bytes(config)
        + context_bytes(config, dtype) * (2 if guided else 1)
    )
    return min(LARGEST_MICRO_BATCH, max(1, budget // needed))


def evaluation_bytes(config: DiTConfig, dtype: torch.dtype) -> int:
    """The activations of one sample in the widest part of a block. Row ops compute in fp32."""
    D, inner = config.hidden_size, config.intermediate_size
    wide = torch.promote_types(dtype, torch.float32).itemsize
    stream = 3 * D * dtype.itemsize
    mlp = 5 * inner * dtype.itemsize
    rows = 5 * D * wide
    attention = 8 * D * dtype.itemsize
    return config.num_tokens * (stream + max(mlp, rows, attention))


def conditioning_bytes(config: DiTConfig, dtype: torch.dtype) -> int:
    """The activations of one sample in the first layer of the adapter."""
    E = config.eva_embedding_size
    return config.num_tokens * E * dtype.itemsize * 5 + 2 * context_bytes(config, dtype)


def context_bytes(config: DiTConfig, dtype: torch.dtype) -> int:
    """The keys and values of one sample in all layers, and its rows of the stream."""
    width = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    width += config.hidden_size
    return config.num_tokens * width * dtype.itemsize


def state_bytes(config: DiTConfig) -> int:
    """The fp32 state of one sample, and the solver's memory beside it."""
    return 8 * config.num_tokens * config.clip_embedding_size * 4


Run = Trajectory | GraphRun
"""A micro-batch under way."""

Start = Callable[[slice, bool], Run]
"""``(samples, shared) -> run``: prepares the micro-batch of those samples."""


def walk(
    start: Start,
    batch: int,
    ends_step: Sequence[bool],
    out: Tensor,
    *,
    limit: int,
    release: Callable[[], None],
    progress: bool = False,
    callback: Callback | None = None,
) -> int:
    """Carry ``batch`` samples from noise to data into ``out``. Returns the limit that fitted.

    Micro-batches of at most ``limit`` samples run one after the other. With a callback, which must
    see the whole batch after every step, all of them advance together. When memory runs out, the
    limit is halved, and the samples that are not done start again from their noise. The callback
    does not see a step twice.

    Args:
        start: prepares a micro-batch.
        batch: number of samples.
        ends_step: for each evaluation, whether a step ends with it.
        out: ``[batch, N, C]``.
        limit: most samples of a micro-batch.
        release: frees memory after it ran out.
        progress: show a bar of steps.
        callback: called after each step, on a copy of the state.

    Raises:
        torch.OutOfMemoryError: if a single sample does not fit.
    """
    done = reported = 0
    steps = sum(ends_step)
    with Progress("sampling", unit="step", enabled=progress) as bar:
        while done < batch:
            parts = even_slices(done, batch, limit)
            group = parts if callback is not None else parts[:1]
            bar.total = bar.done + steps * (1 if callback is not None else len(parts))
            before = bar.done
            try:
                runs = [start(part, len(group) > 1) for part in group]
                step = 0
                for ends in ends_step:
                    for run in runs:
                        run.advance()
                    if not ends:
                        continue
                    bar.update()
                    if callback is not None and step >= reported:
                        callback(step, torch.cat([run.x for run in runs]))
                        reported = step + 1
                    step += 1
                for part, run in zip(group, runs, strict=True):
                    out[part] = run.x
                done = group[-1].stop
                continue
            except torch.OutOfMemoryError:
                if limit == 1:
                    raise torch.OutOfMemoryError(
                        "generate: out of memory on a micro-batch of one sample; free memory or "
                        "use a narrower dtype"
                    ) from None
            # Outside the handler, so that the traceback no longer holds the failed tensors.
            runs = []
            limit = (min(limit, max(p.stop - p.start for p in group)) + 1) // 2
            bar.update(before - bar.done)
            release()
    return limit
