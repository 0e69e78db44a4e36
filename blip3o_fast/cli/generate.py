"""``blip3o-fast generate``: a folder of EVA shards to a folder of CLIP shards.

A sample's noise depends on its key and ``--seed`` alone, so neither the batch size nor the number
of processes nor an interruption changes what is drawn for it. The same command goes on where an
interrupted one stopped. Under torchrun every process translates its share, one GPU each. Threads
read the next batches and write the last ones while the device computes.
"""

import argparse
import sys
from collections.abc import Iterator, Set
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from blip3o_fast.cli.switch import add_switch
from blip3o_fast.devices import DTYPES, find_device
from blip3o_fast.errors import OptionError

if TYPE_CHECKING:
    from blip3o_fast.data import EmbeddingDataset, Manifest
    from blip3o_fast.pretrained import BLIP3oDiT
    from blip3o_fast.processes import World
    from blip3o_fast.sampling import SamplingPlan
    from blip3o_fast.signals import StopSignals

STORED = ("fp32", "bf16", "fp16")
WEIGHT_DTYPES = {**DTYPES, "fp8": torch.float8_e4m3fn}
_STRETCH = 8192  # records in memory at once


class Job(NamedTuple):
    """What to translate, by what, and what the result is."""

    plan: "SamplingPlan"
    data: "EmbeddingDataset"
    facts: "Manifest"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``generate``."""
    add = parser.add_argument
    add(
        "--model_path",
        required=True,
        help="checkpoint folder, training run, .pt file or owner/name",
    )
    add("--embeddings_dir", required=True, help="folder of shards with EVA embeddings")
    add("--output_dir", required=True, help="folder for the CLIP shards; continued if unfinished")
    add("--split", default="all", choices=("all", "train", "heldout"), help="side to translate")
    add("--num_inference_steps", type=int, default=50, help="solver steps; 1 with euler: the mean")
    add(
        "--solver",
        default="heun",
        choices=("euler", "heun", "midpoint", "adams_bashforth2"),
        help="heun and midpoint take two evaluations a step",
    )
    add("--guidance_scale", type=float, default=1.0, help="1 is no guidance")
    add(
        "--time_grid",
        choices=("ascending", "published", "published_trainer"),
        help="of the sampler; None: the model's conventions",
    )
    add("--seed", type=int, default=0, help="with a sample's key, decides its noise")
    add("--batch_size", type=int, default=64, help="samples translated at once, a process")
    add("--samples_per_shard", type=int, default=256, help="rows of a full shard")
    add(
        "--dtype",
        choices=tuple(WEIGHT_DTYPES),
        help="of weights and activations; fp8: of most products, on GPUs that have it, less exact; "
        "None: as stored",
    )
    add("--store_dtype", default="fp16", choices=STORED, help="of the shards")
    add("--num_attention_heads", type=int, help="for a .pt file without its configuration")
    add("--num_key_value_heads", type=int, help="for a .pt file without its configuration")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="device")
    add_switch(parser, "graph", default=None, text="replay steps as CUDA graphs; None: on CUDA")
    add_switch(parser, "compile", default=False, text="torch.compile an evaluation")
    add_switch(parser, "progress", default=True, text="show a bar with samples/s and time left")


def run(args: argparse.Namespace) -> int:
    """Translate what is not translated yet."""
    from blip3o_fast.processes import join_world
    from blip3o_fast.signals import STOPPED, StopSignals

    for name in ("num_inference_steps", "batch_size", "samples_per_shard"):
        if getattr(args, name) < 1:
            raise OptionError(f"{name}: expected at least 1, got {getattr(args, name)}")
    device = find_device(args.device)
    job = prepare(args, device)
    with join_world("auto", device) as world, StopSignals() as signals:
        if device.type == "cuda":
            device = torch.device("cuda", world.local_rank)
        job.plan.model.to(device)
        count = translate(args, job, world, device, signals)
        stopped = world.agree(signals.asked())
        if world.is_main and not stopped:
            finish(args.output_dir)
    if stopped:
        print("blip3o-fast generate: stopped; run again to go on", file=sys.stderr)
        return STOPPED
    if world.is_main:
        print(f"{len(job.data)} samples in {args.output_dir}, {count} of them new here")
    return 0


def prepare(args: argparse.Namespace, device: torch.device) -> Job:
    """Open the data and load the model; whatever does not fit is refused here, before any write."""
    from blip3o_fast import SamplingPlan, load_trained_model
    from blip3o_fast.data import EmbeddingDataset

    model = load_trained_model(
        args.model_path,
        num_attention_heads=args.num_attention_heads,
        num_key_value_heads=args.num_key_value_heads,
    )
    config = model.config
    data = EmbeddingDataset(args.embeddings_dir, split=args.split, tokens=config.num_tokens)
    if data.eva_width != config.eva_embedding_size:
        raise OptionError(
            f"embeddings_dir: expected EVA width {config.eva_embedding_size}, that of the model, "
            f"got {data.eva_width}"
        )
    if Path(args.output_dir).resolve() == data.folder.resolve():
        raise OptionError(f"output_dir: expected another folder than {data.folder}")
    try:
        plan = SamplingPlan(
            model,
            steps=args.num_inference_steps,
            solver=args.solver,
            guidance_scale=args.guidance_scale,
            time_grid=args.time_grid,
            dtype=WEIGHT_DTYPES.get(args.dtype),
            graph=args.graph,
            compile=args.compile,
        )
        plan.check_device(device)
    except ValueError as error:
        raise OptionError(str(error)) from None
    return Job(plan, data, translated_facts(args, model, data))


def translated_facts(
    args: argparse.Namespace, model: "BLIP3oDiT", data: "EmbeddingDataset"
) -> "Manifest":
    """The manifest of the result; a folder of other facts is not continued."""
    from blip3o_fast.data import Encoder

    source = data.manifest.eva_encoder
    how = (
        f"{args.num_inference_steps} {args.solver} steps, guidance {args.guidance_scale:g}, "
        f"{args.time_grid or model.config.conventions} times, {args.dtype or 'stored'} weights, "
        f"seed {args.seed}"
    )
    return data.manifest.replace(
        tokens=data.tokens,
        has_cls=data.has_cls,
        eva_width=0,
        clip_width=model.config.clip_embedding_size,
        dtype=args.store_dtype,
        eva_encoder=None,
        clip_encoder=Encoder(
            f"blip3o_fast {args.model_path}",
            layer=how,
            preprocessing=f"translated from {source.name if source else data.folder.name}",
        ),
        shards=(),
        notes={},
    )


def translate(
    args: argparse.Namespace, job: Job, world: "World", device: torch.device, signals: "StopSignals"
) -> int:
    """This process's share; the number of samples that it translated."""
    from blip3o_fast.data import BackgroundWriter, BatchReader, ShardWriter, read_ahead
    from blip3o_fast.seeds import sample_seed

    part = f"r{world.rank}" if world.size > 1 else ""
    count = 0
    with ShardWriter(
        args.output_dir,
        facts=job.facts,
        samples_per_shard=args.samples_per_shard,
        resume=True,
        part=part,
        merge=False,
    ) as writer:
        missing = untranslated(job.data, writer.done)
        world.barrier()  # nobody writes before everybody has seen what is missing
        mine = missing[world.rank :: world.size].copy()
        del missing
        silent = not (args.progress and world.is_main)
        with (
            tqdm(total=len(mine), desc="generate", unit="sample", disable=silent) as bar,
            BatchReader(job.data, args.batch_size, device=device, records=True) as reader,
            BackgroundWriter(writer) as background,
        ):
            for batch in read_ahead(reader, batches(mine, args.batch_size)):
                if signals.asked():
                    break
                seeds = [sample_seed(key, args.seed) for key in batch.keys]
                clip = job.plan(batch.eva.float(), seeds=seeds)
                background.add(None, clip, batch.records.read())
                count += len(seeds)
                bar.update(len(seeds))
    world.barrier()
    return count


def untranslated(data: "EmbeddingDataset", done: Set[str]) -> np.ndarray:
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


def finish(folder: str) -> None:
    """Make one data set of all parts."""
    from blip3o_fast.data.shards import merge_parts

    merge_parts(folder)
