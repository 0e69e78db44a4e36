"""The measured limits of this device: memory copies, matrix products, transfers from the host."""

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from blip3o_fast.benchmarking.clock import Budget, time_alone
from blip3o_fast.benchmarking.watch import Call, Prepared, make_watch
from blip3o_fast.benchmarking.work import Work
from blip3o_fast.devices import DTYPES

COPY_BYTES = {"cuda": 1 << 30, "cpu": 256 << 20}
GEMM_SIDES = {"cuda": (8192,), "cpu": (512, 1024, 2048)}
HOPELESS = 0.1
"""Share of fp32's rate below which a narrower dtype will not pass it: such a product of the largest
size takes a CPU without bf16 many seconds."""


@dataclass(frozen=True)
class Ceilings:
    """Measured limits of a device.

    Attributes:
        bandwidth: bytes a second that a copy in its memory reads and writes.
        rates: flops a second of a matrix product, by dtype.
        transfer: bytes a second from page-locked host memory to a GPU. On a CPU it is the rate of a
            copy by all cores, even if torch uses fewer threads.
    """

    bandwidth: float
    rates: dict[str, float]
    transfer: float

    def times(self, work: Work, dtype: str) -> dict[str, float]:
        """The least seconds for each kind of work: ``memory``, ``compute``, ``transfer``."""
        return {
            "memory": work.bytes / self.bandwidth,
            "compute": work.flops / self.rates[dtype],
            "transfer": work.transfer / self.transfer,
        }

    def seconds(self, work: Work, dtype: str) -> float:
        """The least time that ``work`` takes here."""
        return max(self.times(work, dtype).values())

    def bound(self, work: Work, dtype: str) -> str:
        """``memory``, ``compute`` or ``transfer``: the highest of the limits."""
        times = self.times(work, dtype)
        return max(times, key=lambda kind: times[kind])

    def best(self, other: "Ceilings") -> "Ceilings":
        """The higher of both, rate by rate."""
        return Ceilings(
            max(self.bandwidth, other.bandwidth),
            {dtype: max(rate, other.rates[dtype]) for dtype, rate in self.rates.items()},
            max(self.transfer, other.transfer),
        )


def measure_ceilings(
    device: torch.device, dtypes: Iterable[str], *, seconds: float = 1.0
) -> Ceilings:
    """Copy large buffers and multiply large matrices, for ``seconds`` each.

    The rate of a dtype is that of the fastest product: of several sizes, and in fp32 where a device
    is slower in a narrower dtype, whose numbers can be widened.
    """
    budget = Budget(seconds, rounds=5)
    bandwidth, transfer = _measure_copies(device, budget)
    rates: dict[str, float] = {}
    for name in dict.fromkeys(("fp32", *dtypes)):
        enough = HOPELESS * rates.get("fp32", 0.0)
        rates[name] = _highest_rate(DTYPES[name], device, seconds, enough)
    return Ceilings(bandwidth, {n: max(rates[n], rates["fp32"]) for n in dtypes}, transfer)


def _highest_rate(dtype: torch.dtype, device: torch.device, seconds: float, enough: float) -> float:
    """Of products of growing size; a dtype that stays below ``enough`` is not tried on larger."""
    sides = GEMM_SIDES[device.type]
    best = 0.0
    for side in sides:
        best = max(best, _product_rate(side, dtype, device, Budget(seconds / len(sides), rounds=5)))
        if best < enough:
            break
    return best


def _product_rate(side: int, dtype: torch.dtype, device: torch.device, budget: Budget) -> float:
    """Flops a second of the product of two square matrices."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2.0 * side**3 / _fastest(lambda: torch.mm(a, b, out=out), device, budget)


def _measure_copies(device: torch.device, budget: Budget) -> tuple[float, float]:
    """Bandwidth and transfer rate."""
    size = COPY_BYTES[device.type]
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> object:
        return target.copy_(source)

    bandwidth = 2 * size / _fastest(copy, device, budget)
    if device.type == "cuda":
        host = torch.ones(size // 4, dtype=torch.uint8, pin_memory=True)
        part = target[: host.numel()]
        seconds = _fastest(lambda: part.copy_(host, non_blocking=True), device, budget)
        return bandwidth, host.numel() / seconds
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        transfer = size / _fastest(copy, device, budget)
        return bandwidth, max(transfer, bandwidth / 2)  # one busy core slows a copy by all cores
    finally:
        torch.set_num_threads(threads)


def _fastest(call: Call, device: torch.device, budget: Budget) -> float:
    """The best quintile of the samples, because a ceiling is what the device can reach."""
    watch = make_watch(Prepared([call]), device)
    watch.start()
    return time_alone(watch, budget).low
