"""The order of samples, a pure function of (seed, epoch).

``epoch_order`` sorts the samples by a hash of (seed, epoch, index), so the order does not depend on
any library's version. A step takes the next ``batch_size`` samples of it, and each rank takes a
contiguous share of the step. The ranks therefore split one global order: the samples of a step do
not depend on the number of ranks, and a position (epoch, step) is all that a resumed run needs.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

_MASK = (1 << 64) - 1


class Position(NamedTuple):
    """The next step to take: ``step`` counts from 0 in each epoch."""

    epoch: int = 0
    step: int = 0


@lru_cache(maxsize=2)
def epoch_order(samples: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of ``range(samples)``, int64, read-only."""
    key = _mix(np.array([_key(seed) ^ (epoch & _MASK)], np.uint64))
    hashes = _mix(np.arange(samples, dtype=np.uint64) + key)
    order = np.argsort(hashes, kind="stable")
    order.setflags(write=False)
    return order


def steps_per_epoch(samples: int, batch_size: int, *, drop_last: bool = True) -> int:
    """Steps of one epoch, the same for every rank."""
    return samples // batch_size if drop_last else -(-samples // batch_size)


def rank_share(order: np.ndarray, step: int, batch_size: int, rank: int, ranks: int) -> np.ndarray:
    """Samples of one rank in one step.

    The step's samples are cut into ``ranks`` contiguous pieces whose sizes differ by at most one.
    Only the last step of an epoch can be short; a rank's piece of it can then be empty.
    """
    batch = order[step * batch_size : (step + 1) * batch_size]
    return batch[len(batch) * rank // ranks : len(batch) * (rank + 1) // ranks]


def _key(seed: int) -> int:
    return int(_mix(np.array([seed & _MASK], np.uint64))[0])


def _mix(x: np.ndarray) -> np.ndarray:
    """The splitmix64 generator's output for counter ``x`` (doi:10.1145/2660193.2660195)."""
    with np.errstate(over="ignore"):
        x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
