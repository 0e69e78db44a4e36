"""Seeds made of names: the same name draws the same numbers in every process and every run.

The two kinds read the hash in opposite byte orders. Each keeps its own: another order would draw
other noise for a run that is resumed, or for a folder of translations that is continued.
"""

import hashlib
from typing import Literal


def stream_seed(*numbers: int) -> int:
    """A 63-bit seed for the training stream that these numbers name."""
    return _hashed(repr(numbers), "big")


def sample_seed(key: str, seed: int) -> int:
    """A 63-bit seed for the noise of one sample: it depends on the key and ``seed`` alone."""
    return _hashed(f"{seed}:{key}", "little")


def _hashed(name: str, order: Literal["big", "little"]) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), order) >> 1
