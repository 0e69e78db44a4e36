"""What this device reaches: bandwidth of a copy, rate of a matrix product."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from blip3o_fast.benchmarking.clock import Budget, Prepared, time_together
from blip3o_fast.benchmarking.work import Work

COPY_BYTES = {"cuda": 1 << 30, "cpu": 256 << 20}
GEMM_SIDE = {"cuda": 8192, "cpu": 1024}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Ceilings:
    """Measured limits of a device: bytes a second, and flops a second by dtype."""

    bandwidth: float
    rates: dict[str, float]

    def seconds(self, work: Work, dtype: str) -> float:
        """The least time that ``work`` takes here."""
        return max(work.bytes / self.bandwidth, work.flops / self.rates[dtype])

    def bound(self, work: Work, dtype: str) -> str:
        """``memory`` or ``compute``: which of the two limits is the higher."""
        moving = work.bytes / self.bandwidth
        return "memory" if moving >= work.flops / self.rates[dtype] else "compute"


def measure_ceilings(
    device: torch.device, dtypes: Iterable[str], *, seconds: float = 1.0
) -> Ceilings:
    """Copy a large buffer and multiply large matrices of each dtype, ``seconds`` each.

    The best quintile counts, not the median: a ceiling is what the device can do.
    """
    budget = Budget(seconds, rounds=5)
    size = COPY_BYTES[device.type]
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = Prepared([lambda target=target, source=source: target.copy_(source)])
    (timing,) = time_together([copy], device, budget)
    bandwidth = 2 * size / timing.low
    del source, target, copy

    side = GEMM_SIDE[device.type]
    rates: dict[str, float] = {}
    for name in dtypes:
        a, b = (torch.randn(side, side, device=device).to(DTYPES[name]) for _ in range(2))
        out = torch.empty_like(a)
        product = Prepared([lambda a=a, b=b, out=out: torch.mm(a, b, out=out)])
        (timing,) = time_together([product], device, budget)
        rates[name] = 2.0 * side**3 / timing.low
    return Ceilings(bandwidth, rates)
