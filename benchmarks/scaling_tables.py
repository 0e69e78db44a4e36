"""The tables of ``SCALING.md``."""

from collections.abc import Sequence

import scale_counts as counts
from scale_counts import H100, SAMPLES, STORED, TOKENS
from tables import number, table

from blip3o_fast.benchmarking.shapes import Shape
from blip3o_fast.config import DiTConfig, Size
from blip3o_fast.data.dataset import _OPEN_SHARDS  # pyright: ignore[reportPrivateUsage]
from blip3o_fast.options.train import TrainingOptions
from blip3o_fast.quantities import duration, three_digits

SIZES: tuple[Size, ...] = ("tiny", "small", "base", "large")
TOKEN_COUNTS = (256, 1024, 4096)
GPUS = (1, 8, 64)
FRACTIONS = (1.0, 0.5, 0.3)
HALF = 0.5
READ_RATES = (0.5e9, 1e9, 3e9, 7e9)
GLOBAL_BATCHES = (1024, 8192)
SHARD_SAMPLES = (256, 4096, 65536)
BACKWARD = 2 / 3
"""The share of the backward pass in the products of a training step."""
DISK = 2e9
"""Bytes a second at which a checkpoint is written. An assumption."""


def rates_table() -> str:
    """The assumed rates of the hardware."""
    return table(
        ("what", "rate"),
        [
            ("bf16 matrix products, dense", f"{H100.flops / 1e12:g} TFLOP/s"),
            ("HBM3", f"{number(H100.bandwidth, 'B/s')}, {number(H100.memory, 'B')}"),
            ("L2", f"{H100.cache / 2**20:g} MiB"),
            ("NVLink, each direction", number(H100.nvlink, "B/s")),
            ("one 400 Gb/s adapter, each direction", number(H100.network, "B/s")),
            ("PCIe Gen5 x16, each direction", number(H100.pcie, "B/s")),
        ],
    )


def sizes_table() -> str:
    """Parameters, and flops of one sample, by preset."""
    rows: list[Sequence[str]] = []
    for size in SIZES:
        one = counts.translating_flops(size, TOKENS, 1, "euler")
        two = counts.translating_flops(size, TOKENS, 2, "euler")
        rows.append(
            (
                size,
                f"{counts.parameters(config(size)) / 1e6:.1f} M",
                number(2 * one - two, "FLOP"),
                number(two - one, "FLOP"),
                number(one, "FLOP"),
                number(counts.translating_flops(size, TOKENS, 50, "heun"), "FLOP"),
                number(counts.training_flops(size, TOKENS), "FLOP"),
            )
        )
    head = ("preset", "parameters", "condition, once", "one evaluation")
    return table((*head, "1 Euler step", "50 Heun steps", "training"), rows)


def data_table() -> str:
    """Bytes of the stored embeddings."""
    base = config("base")
    eva, clip = counts.sample_bytes(base)
    named = (("EVA, width 4096", eva), ("CLIP, width 1024", clip), ("both", eva + clip))
    rows = [
        (name, f"{size // TOKENS:,} B", number(size, "B"), number(size * SAMPLES, "B"))
        for name, size in named
    ]
    return table(("fp16", "a token", "a sample", "all samples"), rows)


def bounds_table() -> str:
    """Compute and memory time of one evaluation by batch and tokens."""
    rows: list[Sequence[str]] = []
    for tokens, batch in [(TOKENS, b) for b in (1, 8, 64)] + [(n, 1) for n in TOKEN_COUNTS[1:]]:
        flops, moved = counts.evaluation_seconds("base", tokens, batch)
        bound = "compute" if flops > moved else "memory"
        rows.append((str(tokens), str(batch), duration(flops), duration(moved), bound))
    return table(("tokens", "batch", "products", "HBM", "bound by"), rows)


def fusions_table() -> str:
    """What further fusion would save in an evaluation of base, for one sample."""
    rows = [
        (
            fusion.name,
            str(fusion.launches),
            number(fusion.bytes, "B"),
            duration(fusion.bytes / H100.bandwidth),
            duration(fusion.flops / H100.flops),
        )
        for fusion in counts.fusions(config("base"))
    ]
    head = ("fusion", "launches spared", "bytes spared", "their time in HBM", "products inside")
    return table(head, rows)


def translation_table() -> str:
    """Hours and rates to translate every sample."""
    eva, clip = counts.sample_bytes(config("base"))
    rows: list[Sequence[str]] = []
    for steps, solver in ((1, "euler"), (50, "heun")):
        flops = SAMPLES * counts.translating_flops("base", TOKENS, steps, solver)
        for gpus in GPUS:
            times = [flops / (H100.flops * share * gpus) for share in FRACTIONS]
            at_half = times[FRACTIONS.index(HALF)]
            rows.append(
                (
                    f"{steps} {solver.capitalize()} step{'s' * (steps > 1)}",
                    str(gpus),
                    *map(duration, times),
                    number(eva * SAMPLES / at_half, "B/s"),
                    number(clip * SAMPLES / at_half, "B/s"),
                )
            )
    head = ("steps", "GPUs", *(f"at {share:.0%}" for share in FRACTIONS))
    return table((*head, "read at 50%", "write at 50%"), rows)


def towers_table() -> str:
    """Sizes of the two encoders, and their flops for one image."""
    towers = (("EVA-CLIP-8B", counts.EVA_TOWER), ("CLIP ViT-L/14", counts.CLIP_TOWER))
    rows = [
        (
            name,
            str(tower.num_hidden_layers),
            str(tower.hidden_size),
            str(tower.intermediate_size),
            f"{tower.image_size} px",
            number(counts.tower_weights(tower) * STORED, "B"),
            number(counts.tower_flops(tower), "FLOP"),
        )
        for name, tower in towers
    ]
    return table(("encoder", "layers", "width", "MLP", "image", "weights", "an image"), rows)


def extraction_table() -> str:
    """Time to encode all images, and the rates of images and bytes at half of the peak."""
    flops = counts.tower_flops(counts.EVA_TOWER) + counts.tower_flops(counts.CLIP_TOWER)
    size = sum(counts.sample_bytes(config("base")))
    rows: list[Sequence[str]] = []
    for gpus in GPUS:
        times = [SAMPLES * flops / (H100.flops * share * gpus) for share in FRACTIONS]
        rate = H100.flops * HALF * gpus / flops
        rates = (three_digits(rate), number(rate * size, "B/s"))
        rows.append((str(gpus), *map(duration, times), *rates))
    head = ("GPUs", *(f"at {share:.0%}" for share in FRACTIONS), "images a second at 50%")
    return table((*head, "written at 50%"), rows)


def training_table() -> str:
    """Time of one epoch, and the rate at which it reads."""
    rows: list[Sequence[str]] = []
    for size in SIZES:
        flops = SAMPLES * counts.training_flops(size, TOKENS)
        stored = sum(counts.sample_bytes(config(size))) * SAMPLES
        for gpus in GPUS:
            times = [flops / (H100.flops * share * gpus) for share in FRACTIONS]
            at_half = times[FRACTIONS.index(HALF)]
            rate = number(stored / at_half, "B/s")
            rows.append((size, str(gpus), *map(duration, times), rate))
    head = ("preset", "GPUs", *(f"at {share:.0%}" for share in FRACTIONS))
    return table((*head, "read at 50%"), rows)


def feeds_table() -> str:
    """The fraction of the peak at which reading takes as long as training."""
    rows: list[Sequence[str]] = []
    for size in SIZES:
        per_byte = counts.training_flops(size, TOKENS) / sum(counts.sample_bytes(config(size)))
        rows.append((size, *(share_of_peak(per_byte * rate) for rate in READ_RATES)))
    return table(("read, a GPU", *(number(rate, "B/s") for rate in READ_RATES)), rows)


def reduce_table() -> str:
    """A step's products beside its all-reduce."""
    base = config("base")
    rows: list[Sequence[str]] = []
    for batch in GLOBAL_BATCHES:
        for gpus in GPUS[1:]:
            step = step_seconds(batch // gpus)
            within, between = counts.all_reduce_seconds(base, gpus)
            _, alone = counts.all_reduce_seconds(base, gpus, adapters=1)
            hidden = "yes" if within + between < step * BACKWARD else "no"
            hidden_alone = "yes" if within + alone < step * BACKWARD else "no"
            network = (duration(between), duration(alone)) if between else ("none", "none")
            each = (str(batch), str(gpus), str(batch // gpus), duration(step))
            rows.append((*each, duration(within), *network, f"{hidden}, {hidden_alone}"))
    head = ("`--batch_size`", "GPUs", "samples a GPU", "step at 50%", "NVLink")
    return table((*head, "8 adapters", "1 adapter", "hidden with 8, with 1"), rows)


def training_memory_table() -> str:
    """State, bytes a sample, and how many samples fit."""
    rows: list[Sequence[str]] = []
    for size in SIZES:
        for tokens in TOKEN_COUNTS:
            shape = config(size, tokens)
            plain, less = (
                (
                    number(counts.training_sample(shape, checkpointing=on), "B"),
                    str(counts.most_samples(shape, checkpointing=on)),
                )
                for on in (False, True)
            )
            state = number(counts.training_state(shape), "B")
            rows.append((size, str(tokens), state, *plain, *less))
    head = ("preset", "tokens", "state", "a sample", "fit")
    return table((*head, "a sample, checkpointing", "fit, checkpointing"), rows)


def sampling_memory_table() -> str:
    """Weights, and bytes of a sample in and out of the micro-batch."""
    rows = [
        (
            size,
            str(tokens),
            number(counts.sampling_weights(shape), "B"),
            number(counts.sampling_sample(shape), "B"),
            str(counts.micro_batch(shape)),
            number(counts.sampling_working(shape), "B"),
        )
        for size in SIZES
        for tokens in TOKEN_COUNTS
        for shape in (config(size, tokens),)
    ]
    head = ("preset", "tokens", "weights", "a sample of the call", "micro-batch")
    return table((*head, "a sample of the micro-batch, besides"), rows)


def throughput_table() -> str:
    """Samples a second and GPU at half of the peak."""
    rows: list[Sequence[str]] = []
    for size in SIZES:
        for tokens in TOKEN_COUNTS:
            flops = (
                counts.translating_flops(size, tokens, 1, "euler"),
                counts.translating_flops(size, tokens, 50, "heun"),
                counts.training_flops(size, tokens),
            )
            rows.append((size, str(tokens), *(three_digits(H100.flops * HALF / f) for f in flops)))
    return table(("preset", "tokens", "1 Euler step", "50 Heun steps", "training"), rows)


def checkpoints_table() -> str:
    """Bytes and seconds of a checkpoint, without and with an average."""
    rows: list[Sequence[str]] = []
    kept = TrainingOptions("shards", "run").keep_last + 2
    for size in SIZES:
        model, rest = counts.checkpoint_bytes(config(size), average=False)
        _, with_average = counts.checkpoint_bytes(config(size), average=True)
        whole = model + with_average
        numbers = (model, rest, with_average, whole * kept)
        rows.append((size, *(number(n, "B") for n in numbers), duration(whole / DISK)))
    head = ("preset", "`model.safetensors`", "`trainer.pt`", "with `--ema_decay`")
    return table((*head, f"{kept} of these", "to write one"), rows)


def shards_table() -> str:
    """Number and size of the shards by ``--samples_per_shard``, and how often one is open."""
    size = sum(counts.sample_bytes(config("base")))
    rows = [
        (
            str(n),
            f"{-(-SAMPLES // n):,}",
            number(n * size, "B"),
            f"{min(1.0, _OPEN_SHARDS / -(-SAMPLES // n)):.1%}",
        )
        for n in SHARD_SAMPLES
    ]
    return table(("`--samples_per_shard`", "shards", "one shard", "found open"), rows)


def step_seconds(batch: int) -> float:
    """Products of a training step of base on one GPU at half of the peak."""
    return batch * counts.training_flops("base", TOKENS) / (H100.flops * HALF)


def config(size: Size, tokens: int = TOKENS) -> DiTConfig:
    """A preset at some tokens."""
    return Shape(size, 1, tokens).config


def share_of_peak(flops: float) -> str:
    """The share of the peak of ``H100``, at most all of it."""
    return f"{min(1.0, flops / H100.flops):.0%}"
