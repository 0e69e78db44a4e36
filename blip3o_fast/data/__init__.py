"""Shards of paired embeddings: format, order, loading.

``Manifest`` and ``Shard`` describe and read a folder of safetensors shards, ``ShardWriter`` makes
one, ``EmbeddingDataset`` indexes it, and ``Loader`` turns it into batches in an order that is a
pure function of (seed, epoch). ``BatchReader`` and ``BackgroundWriter`` read and write while the
device computes. ``convert`` makes shards of the published pickles, which are never
executed, and of other formats.
"""

from blip3o_fast.data.background import BackgroundWriter
from blip3o_fast.data.conversion import convert
from blip3o_fast.data.conversion_plan import Wishes
from blip3o_fast.data.dataset import Batch, EmbeddingDataset
from blip3o_fast.data.loader import Loader
from blip3o_fast.data.manifest import Encoder, Manifest, ShardEntry, Split
from blip3o_fast.data.order import Position, epoch_order
from blip3o_fast.data.parts import merge_parts
from blip3o_fast.data.readahead import BatchReader, read_ahead
from blip3o_fast.data.shards import SampleRecord, Shard, ShardWriter

__all__ = [
    "Encoder",
    "ShardEntry",
    "Split",
    "Manifest",
    "SampleRecord",
    "Shard",
    "ShardWriter",
    "merge_parts",
    "Batch",
    "EmbeddingDataset",
    "Position",
    "epoch_order",
    "Loader",
    "BatchReader",
    "read_ahead",
    "BackgroundWriter",
    "Wishes",
    "convert",
]
