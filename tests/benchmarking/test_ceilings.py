"""Limits of a device, and which of them bounds a task."""

import math

import pytest
import torch

from blip3o_fast.benchmarking import ceilings as module
from blip3o_fast.benchmarking.ceilings import Ceilings, measure_ceilings
from blip3o_fast.benchmarking.work import Work

DEVICE = Ceilings(bandwidth=1e12, rates={"bf16": 1e15, "fp32": 1e14}, transfer=1e10)


@pytest.mark.parametrize(
    ("work", "dtype", "seconds", "bound"),
    [
        (Work(1e15, 1e11), "bf16", 1.0, "compute"),
        (Work(1e15, 1e11), "fp32", 10.0, "compute"),
        (Work(1e13, 1e12), "bf16", 1.0, "memory"),
        (Work(0.0, 1e12, 2e10), "bf16", 2.0, "transfer"),
    ],
)
def test_the_highest_limit_counts(work, dtype, seconds, bound):
    assert DEVICE.seconds(work, dtype) == pytest.approx(seconds)
    assert DEVICE.bound(work, dtype) == bound


def test_the_best_of_two_measurements():
    other = Ceilings(bandwidth=5e11, rates={"bf16": 2e15, "fp32": 1e13}, transfer=3e10)
    assert DEVICE.best(other) == Ceilings(1e12, {"bf16": 2e15, "fp32": 1e14}, 3e10)


def test_a_cpu_is_measured(monkeypatch):
    monkeypatch.setitem(module.COPY_BYTES, "cpu", 1 << 16)
    monkeypatch.setitem(module.GEMM_SIDES, "cpu", (16, 32))
    threads = torch.get_num_threads()
    measured = measure_ceilings(torch.device("cpu"), ("fp32", "bf16"), seconds=0.01)
    assert torch.get_num_threads() == threads
    assert set(measured.rates) == {"fp32", "bf16"}
    assert all(0 < x < math.inf for x in (measured.bandwidth, *measured.rates.values()))
    assert measured.transfer >= measured.bandwidth / 2


def test_a_narrow_dtype_is_no_slower_than_fp32(monkeypatch):
    """A CPU without bf16 multiplies it a thousand times slower: no limit for code that widens."""
    rates = {
        (16, torch.float32): 3e9,
        (32, torch.float32): 2e9,
        (16, torch.bfloat16): 1e6,
        (32, torch.bfloat16): 2e6,
        (16, torch.float16): 1e9,
        (32, torch.float16): 5e9,
    }
    monkeypatch.setitem(module.GEMM_SIDES, "cpu", (16, 32))
    monkeypatch.setitem(module.COPY_BYTES, "cpu", 1 << 16)
    asked = []

    def rate(side, dtype, *rest):
        asked.append((side, dtype))
        return rates[side, dtype]

    monkeypatch.setattr(module, "_product_rate", rate)
    measured = measure_ceilings(torch.device("cpu"), ("bf16", "fp16"), seconds=0.01)
    assert measured.rates == {"bf16": 3e9, "fp16": 5e9}
    assert (32, torch.bfloat16) not in asked and (32, torch.float16) in asked
