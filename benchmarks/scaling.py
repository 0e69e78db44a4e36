"""``SCALING.md``: the text of ``SCALING.template.md`` with the numbers of ``scale_counts``.

``render.py`` writes it.
"""

import math
from pathlib import Path
from string import Template

import scale_counts as counts
import scaling_tables as page
from scale_counts import FP32, H100, SAMPLES, TOKENS
from scaling_tables import BACKWARD, DISK, GLOBAL_BATCHES, GPUS, HALF, config, step_seconds
from tables import number

from blip3o_fast.data.dataset import _OPEN_SHARDS  # pyright: ignore[reportPrivateUsage]
from blip3o_fast.data.sidecar import MARK_EVERY
from blip3o_fast.options.train import TrainingOptions
from blip3o_fast.quantities import duration

FOLDER = Path(__file__).parent
PAGE = FOLDER / "SCALING.md"
TEMPLATE = FOLDER / "SCALING.template.md"
SAMPLES_A_GPU = GLOBAL_BATCHES[-1] // GPUS[-1]
SLOW_STORAGE = 10e9
HOST_CROSSINGS = 4
"""How often a byte of a batch crosses memory: into the page cache and out, into a page-locked
buffer and out."""
PLACE = 4 + 1 + 8 / MARK_EVERY
"""Bytes for each sample: its row, whether it was checked, its share of the places in sidecars."""
ORDER = 8
"""Bytes of a sample's number in an epoch's order."""


def render() -> str:
    """The page."""
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(values())


def values() -> dict[str, str]:
    """The values of the template's names: ``NAME_table`` of ``scaling_tables``, and numbers."""
    tables = {
        name.removesuffix("_table"): make()
        for name, make in vars(page).items()
        if name.endswith("_table")
    }
    return {**tables, **sentences()}


def sentences() -> dict[str, str]:
    """Numbers within sentences."""
    base, options = config("base"), TrainingOptions("shards", "run")
    eva, clip = counts.sample_bytes(base)
    whole = eva + clip
    trained = H100.flops * HALF / counts.training_flops("base", TOKENS) * whole
    pinned = (options.num_workers + 1) * SAMPLES_A_GPU * whole
    encoding = counts.tower_flops(counts.EVA_TOWER) + counts.tower_flops(counts.CLIP_TOWER)
    within, between = counts.all_reduce_seconds(base, GPUS[-1])
    _, alone = counts.all_reduce_seconds(base, GPUS[-1], adapters=1)
    backward = step_seconds(1) * BACKWARD
    return {
        "samples": f"{SAMPLES / 1e6:g} million",
        "intensity": f"{H100.flops / H100.bandwidth:.0f}",
        "sample_size": number(whole, "B"),
        "encoding_flops": number(encoding, "FLOP"),
        "encoding_rate": f"{H100.flops * HALF / encoding:.0f}",
        "encoding_hours": duration(SAMPLES * encoding / (H100.flops * HALF)),
        "encoding_hours_all": duration(SAMPLES * encoding / (H100.flops * HALF * GPUS[-1])),
        "encoding_to_training": f"{encoding / counts.training_flops('base', TOKENS):.0f}",
        "set": number(whole * SAMPLES, "B"),
        "one_read": read_rate(1, "euler"),
        "many_read": read_rate(50, "heun"),
        "epoch_read": number(trained, "B/s"),
        "epoch_read_all": number(trained * GPUS[-1], "B/s"),
        "host_traffic": number(trained * H100.gpus * HOST_CROSSINGS, "B/s"),
        "slow": number(SLOW_STORAGE, "B/s"),
        "slow_epoch": duration(whole * SAMPLES / SLOW_STORAGE),
        "gradients": number(counts.parameters(base) * FP32, "B"),
        "large_state": number(counts.training_state(config("large")), "B"),
        "hidden_from": str(math.ceil((within + between) / backward)),
        "hidden_from_alone": str(math.ceil((within + alone) / backward)),
        "a_gpu": str(SAMPLES_A_GPU),
        "workers": str(options.num_workers),
        "pinned": number(pinned, "B"),
        "pinned_machine": number(H100.gpus * pinned, "B"),
        "places": number(SAMPLES * PLACE, "B"),
        "order": number(SAMPLES * ORDER, "B"),
        "open_shards": str(_OPEN_SHARDS),
        "keep_last": str(options.keep_last),
        "epoch_steps": f"{SAMPLES // GLOBAL_BATCHES[-1]:,}",
        "save_every": str(options.save_every_n_steps),
        "save_seconds": duration(options.save_every_n_steps * step_seconds(SAMPLES_A_GPU)),
        "eval_every": str(options.eval_every_n_steps),
        "eval_samples": str(options.eval_num_samples),
        "eval_steps": str(options.eval_inference_steps),
        "disk": number(DISK, "B/s"),
    }


def read_rate(steps: int, solver: str) -> str:
    """The rate at which one GPU reads if it translates at half of the peak."""
    eva, _ = counts.sample_bytes(config("base"))
    flops = counts.translating_flops("base", TOKENS, steps, solver)
    return number(H100.flops * HALF / flops * eva, "B/s")
