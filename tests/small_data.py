"""Small shards of a learnable translation, a model of their size, and a report in short."""

import torch

from blip3o_fast import BLIP3oDiT, DiTConfig
from blip3o_fast.data import Manifest, SampleRecord, ShardWriter, Split

GRID, E, C = (1, 2, 3), 10, 6
N = 6


def write_shards(folder, samples=24, *, heldout=0.3, photos=12, **changes):
    """``clip`` is a fixed linear map of ``eva`` plus noise; two crops of each photo."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(E, C, generator=generator)
    eva = torch.randn(samples, N, E, generator=generator)
    clip = eva @ mix + 0.3 * torch.randn(samples, N, C, generator=generator)
    facts = Manifest(
        tokens=N,
        has_cls=False,
        grid=GRID,
        eva_width=E,
        clip_width=C,
        dtype="fp32",
        split=Split(heldout),
    )
    records = [SampleRecord(f"sample{i}", "", f"photo{i % photos}") for i in range(samples)]
    with ShardWriter(folder, facts=facts.replace(**changes), samples_per_shard=10) as writer:
        writer.add(eva, clip, records)
    return folder


def small_config(**changes):
    fields = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 24,
        "eva_embedding_size": E,
        "clip_embedding_size": C,
        "num_tokens": N,
        "grid": GRID,
        "eva_adapter_layers": 1,
        "zero_init_output": False,
    }
    return DiTConfig(**{**fields, **changes})


def small_model(*, seed=0, **changes):
    torch.manual_seed(seed)
    return BLIP3oDiT(small_config(**changes)).eval()


def small_report():
    """``report.json`` with what a model card reads."""

    def metrics(cosine):
        interval = {"value": cosine, "low": cosine - 0.1, "high": cosine + 0.1}
        names = dict.fromkeys(("token_cosine", "image_cosine", "r2"), interval)
        return {**names, "samples": 7, "recall_generated_to_target": {"1": interval}}

    return {
        **{"format_version": 1, "mean_predictor": metrics(0.25), "ridge": metrics(0.5)},
        "dit": [{"evaluations": 1, **metrics(0.75)}],
        "fitted": [{"evaluations": 5, "solver_error": 0.01, **metrics(0.625)}],
    }
