"""Translation of a folder of EVA shards to a folder of CLIP shards.

A sample's noise depends only on its key and the seed, not on the batch size, the number of
processes or interruptions. Called again, an interrupted translation continues where it stopped.
Under torchrun every process translates its share, one GPU each. Threads read the next batches and
write the last ones while the device computes.
"""

from collections.abc import Iterator, Set
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from blip3o_fast.atomic import locked
from blip3o_fast.checkpoint import content_digest
from blip3o_fast.data import (
    BackgroundWriter,
    BatchReader,
    EmbeddingDataset,
    Encoder,
    Manifest,
    ShardWriter,
    merge_parts,
    read_ahead,
)
from blip3o_fast.data.verified import verify_once
from blip3o_fast.devices import DTYPES, find_device
from blip3o_fast.errors import NonFiniteSamples, OptionError
from blip3o_fast.flow import FittedSolver
from blip3o_fast.hub import typed
from blip3o_fast.options.generate import TranslationOptions
from blip3o_fast.pretrained import BLIP3oDiT, load_trained_model
from blip3o_fast.processes import World, join_world
from blip3o_fast.progress import Progress
from blip3o_fast.sampling import SamplingPlan
from blip3o_fast.seeds import sample_seed
from blip3o_fast.signals import StopSignals

_STRETCH = 8192  # records in memory at once
_DIGITS = 16  # of a digest
_PATIENCE = timedelta(days=1)  # processes finish their shares at different times
_LISTED = 8  # keys named in an error


class Translated(NamedTuple):
    """What a process did.

    Attributes:
        samples: those to translate, by all processes and earlier runs.
        added: those that this process translated now.
        stopped: whether a signal ended the work early.
        is_main: whether this is the process that speaks for all.
    """

    samples: int
    added: int
    stopped: bool
    is_main: bool


def translate_folder(options: TranslationOptions) -> Translated:
    """Translate what is not translated yet.

    Raises:
        OptionError: before anything is written, naming the option that does not fit.
        FileNotFoundError: if the model or the shards are missing.
        ValueError: naming the shard, the row and the key, if a sample holds NaN or Inf; or if the
            folder holds a translation of other facts.
    """
    device = find_device(options.device)
    model = load_trained_model(
        typed(options.model_path),
        revision=options.revision,
        num_attention_heads=options.num_attention_heads,
        num_key_value_heads=options.num_key_value_heads,
    )
    data = open_source(options, model)
    plan = make_sampler(options, model, device)
    facts = translated_facts(options, plan, data)
    with (
        join_world("auto", device, _PATIENCE) as world,
        StopSignals(alone=world.size == 1) as signals,
    ):
        if device.type == "cuda":
            device = torch.device("cuda", world.local_rank)
        model.to(device)
        with locked(Path(options.output_dir)) if world.is_main else nullcontext():
            world.barrier()
            added = translate_share(options, plan, data, facts, world, device, signals)
            stopped = world.agree(signals.asked())
            if world.is_main and not stopped:
                merge_parts(options.output_dir)
        return Translated(len(data), added, stopped, world.is_main)


def open_source(options: TranslationOptions, model: BLIP3oDiT) -> EmbeddingDataset:
    """The samples to translate; whatever does not fit the model is refused."""
    config = model.config
    data = EmbeddingDataset(options.embeddings_dir, split=options.split, tokens=config.num_tokens)
    if data.eva_width != config.eva_embedding_size:
        raise OptionError(
            f"embeddings_dir: expected EVA width {config.eva_embedding_size}, that of the model, "
            f"got {data.eva_width}"
        )
    if Path(options.output_dir).resolve() == data.folder.resolve():
        raise OptionError(f"output_dir: expected another folder than {data.folder}")
    return data


def make_sampler(
    options: TranslationOptions, model: BLIP3oDiT, device: torch.device
) -> SamplingPlan:
    """The sampler that the options ask for, if it can run on the device."""
    dtypes = {**DTYPES, "fp8": torch.float8_e4m3fn}
    try:
        plan = SamplingPlan(
            model,
            steps=options.num_inference_steps,
            solver=options.solver,
            guidance_scale=options.guidance_scale,
            time_grid=options.time_grid,
            dtype=None if options.dtype is None else dtypes[options.dtype],
            graph=options.graph,
            compile=options.compile,
        )
    except ValueError as error:
        raise OptionError(str(error)) from None
    if (refusal := plan.refusal(device)) is not None:
        raise OptionError(f"dtype: fp8: {refusal}; choose bf16, fp16 or fp32")
    return plan


def translated_facts(
    options: TranslationOptions, plan: SamplingPlan, data: EmbeddingDataset
) -> Manifest:
    """The manifest of the result; a folder of other facts is not continued.

    The model's weights, a fitted solver and the source's shards are known by their contents.
    """
    config = plan.model.config
    source, solver = data.manifest.eva_encoder, options.solver
    if isinstance(plan.solver, FittedSolver):
        solver += f" ({plan.solver.digest[:_DIGITS]})"
    how = (
        f"{options.num_inference_steps} {solver} steps, guidance "
        f"{options.guidance_scale:g}, {options.time_grid or config.conventions} times, "
        f"{options.dtype or 'stored'} weights, seed {options.seed}"
    )
    return data.manifest.replace(
        tokens=data.tokens,
        has_cls=data.has_cls,
        eva_width=0,
        clip_width=config.clip_embedding_size,
        dtype=options.store_dtype,
        eva_encoder=None,
        clip_encoder=Encoder(
            f"blip3o_fast {options.model_path}",
            revision=f"weights {content_digest(config, plan.model.state_dict())[:_DIGITS]}",
            layer=how,
            preprocessing=f"translated from {source.name if source else data.folder.name}, "
            f"shards {data.manifest.digest()[:_DIGITS]}",
        ),
        shards=(),
        notes={},
    )


def translate_share(
    options: TranslationOptions,
    plan: SamplingPlan,
    data: EmbeddingDataset,
    facts: Manifest,
    world: World,
    device: torch.device,
    signals: StopSignals,
) -> int:
    """This process's share; the number of samples that it translated."""
    count = 0
    with ShardWriter(
        options.output_dir,
        facts=facts,
        samples_per_shard=options.samples_per_shard,
        resume=True,
        part=f"r{world.rank}" if world.size > 1 else "",
        merge=False,
    ) as writer:
        missing = untranslated(data, writer.done)
        verify_once(data.folder, data.manifest.shards, Path(options.output_dir), world)
        world.barrier()  # nobody writes before everybody has seen what is missing
        mine = missing[world.rank :: world.size].copy()
        del missing
        shown = options.progress and world.is_main
        with (
            Progress("generate", len(mine), "sample", enabled=shown) as bar,
            BatchReader(data, options.batch_size, device=device, records=True) as reader,
            BackgroundWriter(writer) as background,
        ):
            for batch in read_ahead(reader, batches(mine, options.batch_size)):
                if signals.asked():
                    break
                seeds = [sample_seed(key, options.seed) for key in batch.keys]
                try:
                    clip = plan(batch.eva.float(), seeds=seeds)
                except NonFiniteSamples as error:
                    keys = ", ".join(batch.keys[i] for i in error.samples[:_LISTED])
                    raise ValueError(f"{error} (keys {keys})") from None
                background.add(None, clip, batch.records.read())
                count += len(seeds)
                bar.update(len(seeds))
    world.barrier()
    return count


def untranslated(data: EmbeddingDataset, done: Set[str]) -> np.ndarray:
    """Samples whose key is not done, by index, int64; a stretch of records at a time in memory."""
    if not done:
        return np.arange(len(data))
    left = [
        stretch[[record.key not in done for record in data.records(stretch)]]
        for stretch in batches(np.arange(len(data)), _STRETCH)
    ]
    return np.concatenate(left)


def batches(indices: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Consecutive stretches of at most ``size``."""
    return (indices[start : start + size] for start in range(0, len(indices), size))
