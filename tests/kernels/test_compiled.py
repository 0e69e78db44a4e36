"""What the kernels compile to for GPUs that are not here: ``kernels/inspect_kernels.py``.

In a process of its own, since this one may have replaced the compiler by the interpreter.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from blip3o_fast.ops import OPS

INSPECT = Path(__file__).parents[2] / "kernels" / "inspect_kernels.py"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def inspect(folder, *arguments):
    """The reports of one run, which must have found nothing wrong."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    reports = folder / "reports.json"
    done = subprocess.run(
        [sys.executable, INSPECT, "--json", reports, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout, json.loads(reports.read_text())


def test_every_kernel_for_the_target(tmp_path):
    """bf16 on sm_90: no fp64, no local memory, no atomics, 16-byte accesses, no spills."""
    table, reports = inspect(tmp_path, "--arch", "90", "--dtype", "bf16")
    assert {r["op"] for r in reports} == {op.name for op in OPS.values() if op.triton}
    for r in reports:
        assert not (r["stack"] or r["fp64"] or r["local"] or r["atomics"]), r
        assert 0 < r["registers"] <= 255 and r["kernel"] in table
    tiles = [r for r in reports if r["op"] == "gemm_swiglu"]
    assert [r["num_warps"] for r in tiles] == [8, 4, 4]
    for r in tiles:
        # wgmma one after another, and TMA in both directions.
        assert r["tma"] and r["products"] > r["waited"], r
        assert r["shared"] <= 227 * 1024
    assert quantised(reports) == {
        ("swiglu.forward_kernel", "quantised"),
        ("sandwich_norm.forward_kernel", "quantised"),
        ("sandwich_join.forward_kernel", "pre+quantised"),
        ("sandwich_join.forward_kernel", "post+pre+quantised"),
        ("sandwich_join.forward_kernel", "layer_scale+pre+quantised"),
        ("sandwich_join.forward_kernel", "layer_scale+post+pre+quantised"),
    }


def quantised(reports):
    """Kernel and variant of those that write e4m3."""
    return {(r["kernel"], r["variant"]) for r in reports if "quantised" in r["variant"]}


@pytest.mark.parametrize(
    "arch, dtype, op",
    [
        pytest.param("80", "fp32", "sandwich_norm", marks=pytest.mark.slow),
        pytest.param("100", "fp16", "flow_loss", marks=pytest.mark.slow),
        pytest.param("80", "bf16/fp32", "rope", marks=pytest.mark.slow),
        ("100", "bf16/fp32", "swiglu"),
    ],
)
def test_other_targets(tmp_path, arch, dtype, op):
    _, reports = inspect(tmp_path, "--arch", arch, "--dtype", dtype, "--op", op)
    assert reports and {(r["arch"], r["precision"]) for r in reports} == {(int(arch), dtype)}
    # sm_80 has no conversion to e4m3, which is left out there.
    assert bool(quantised(reports)) == (op == "swiglu")


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_whole_matrix(tmp_path, arch):
    """Every kernel in four precisions: three minutes of compilation."""
    _, reports = inspect(tmp_path, "--arch", str(arch))
    assert {r["arch"] for r in reports} == {arch}
    assert {r["precision"] for r in reports} == {"bf16", "bf16/fp32", "fp16", "fp32"}


def test_the_rules_can_fail(tmp_path):
    """A report that breaks every rule is named for each."""
    code = (
        "import sys, json; sys.path.insert(0, sys.argv[1]); import inspect_kernels as k\n"
        "fields = dict.fromkeys(k.Report._fields, 1)\n"
        "wide, half = ('wide_loads', 'wide_stores', 'tma'), ('half_loads', 'half_stores')\n"
        "stores = dict.fromkeys(wide + half, 0)\n"
        "fields.update(kernel='swiglu.forward_kernel', **stores)\n"
        "bad = [k.Report(**fields | {'variant': v}) for v in ('', 'quantised')]\n"
        "bad += [k.Report(**fields | {'kernel': 'sandwich_join.backward_kernel', 'variant': ''})]\n"
        "print(json.dumps(k.problems(bad)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, INSPECT.parent], capture_output=True, text=True, check=True
    )
    always = ["fp64 arithmetic", "local memory", "atomics", "no 16-byte load"]
    waited = "every product is waited for"
    assert [line.rpartition(": ")[2] for line in json.loads(done.stdout)] == [
        *(*always, "no 16-byte store", waited),
        *(*always, waited, "no 8-byte store"),
        *(*always[:3], "no 8-byte load", waited, "no 8-byte store"),
    ]
