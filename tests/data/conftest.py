from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from blip3o_fast.data.manifest import Encoder, Manifest, Split
from blip3o_fast.data.shards import SampleRecord, ShardWriter
from blip3o_fast.devices import DTYPES

TOKENS, EVA_WIDTH, CLIP_WIDTH = 4, 6, 5


def _facts(**changes) -> Manifest:
    facts = Manifest(
        tokens=TOKENS,
        has_cls=False,
        grid=(1, 2, 2),
        eva_width=EVA_WIDTH,
        clip_width=CLIP_WIDTH,
        dtype="fp32",
        eva_encoder=Encoder("tower-a", "r1", "last", "64 px"),
        clip_encoder=Encoder("tower-b"),
        split=Split(0.25),
    )
    return facts.replace(**changes)


def _features(facts: Manifest, start: int, stop: int) -> tuple[Tensor, Tensor, list[SampleRecord]]:
    """Samples start to stop of an endless data set: sample i does not depend on the range."""
    pairs = []
    for i in range(start, stop):
        generator = torch.Generator().manual_seed(i)
        pairs.append(
            [
                torch.randn(facts.tokens, width, generator=generator)
                for width in (facts.eva_width, facts.clip_width)
            ]
        )
    eva, clip = (torch.stack(tower).to(DTYPES[facts.dtype]) for tower in zip(*pairs, strict=True))
    records = [
        SampleRecord(f"key{i}", f"caption {i}", f"photo{i // 2}") for i in range(start, stop)
    ]
    return eva, clip, records


@pytest.fixture
def facts() -> Manifest:
    return _facts()


@pytest.fixture
def features() -> Callable[[Manifest, int, int], tuple[Tensor, Tensor, list[SampleRecord]]]:
    return _features


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[..., Path]:
    """Writes ``samples`` samples; two neighbours share a photo."""

    def make(
        samples: int = 20, name: str = "shards", samples_per_shard: int = 6, **changes
    ) -> Path:
        facts = _facts(**changes)
        with ShardWriter(tmp_path / name, facts=facts, samples_per_shard=samples_per_shard) as w:
            w.add(*_features(facts, 0, samples))
        return tmp_path / name

    return make
