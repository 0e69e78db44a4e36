"""When the CUDA kernels run: asked for, or chosen by measurements, never silently replaced."""

import json
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from blip3o_fast import ops
from blip3o_fast.ops import _cuda, _dispatch
from blip3o_fast.ops._cuda import Choice, CudaBuild


@pytest.fixture
def x() -> torch.Tensor:
    """What a CUDA tensor of 768 columns looks like, on a machine that has no GPU."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return torch.empty(2, 3, 768, dtype=torch.bfloat16, device="cuda")


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The build is there; the call is being captured in a graph."""
    monkeypatch.setattr(_cuda, "_BUILD", CudaBuild(True, "loaded"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


def test_a_graph_runs_triton_until_something_was_measured(loaded: None, x: torch.Tensor) -> None:
    assert _cuda.read_choices() == ()
    assert ops.resolve_impl(None, x, op="swiglu") is ops.Impl.TRITON


def test_eager_calls_run_the_build(
    loaded: None, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(_dispatch, "_eager", ops.Impl.CUDA)
    assert ops.resolve_impl(None, x, op="swiglu") is ops.Impl.CUDA
    assert ops.resolve_impl(None, x.double(), op="swiglu") is ops.Impl.TRITON
    assert ops.resolve_impl(None, x, op="adapter_norm") is ops.Impl.TRITON
    assert ops.resolve_impl(None, x, op="rope_attention") is ops.Impl.REFERENCE
    ops.prefer_eager(ops.Impl.TRITON)
    assert ops.resolve_impl(None, x, op="swiglu") is ops.Impl.TRITON
    with pytest.raises(ValueError, match=r"expected Impl\.CUDA or Impl\.TRITON, got"):
        ops.prefer_eager(ops.Impl.ATEN)


def test_the_environment_chooses_for_eager_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLIP3O_FAST_EAGER", "triton")
    assert _dispatch._eager_by_environment() is ops.Impl.TRITON
    monkeypatch.setenv("BLIP3O_FAST_EAGER", "reference")
    with pytest.raises(ValueError, match="BLIP3O_FAST_EAGER: expected cuda or triton, got 'ref"):
        _dispatch._eager_by_environment()


def test_a_measurement_chooses_its_own_case_alone(
    loaded: None, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    entry = {
        "op": "swiglu",
        "capability": "9.0",
        "dtype": "bfloat16",
        "narrowest": 512,
        "widest": 1024,
        "result": "benchmarks/results/swiglu.json",
    }
    table = tmp_path / "choices.json"
    table.write_text(json.dumps({"measured": [entry]}))
    monkeypatch.setattr(_cuda, "_MEASURED", _cuda.read_choices(table))
    assert Choice(**entry) in _cuda._MEASURED
    assert ops.resolve_impl(None, x, op="swiglu") is ops.Impl.CUDA
    for other, op in ((x.new_empty(2, 3, 256), "swiglu"), (x.half(), "swiglu"), (x, "rope")):
        assert ops.resolve_impl(None, other, op=op) is ops.Impl.TRITON


def test_without_triton_the_build_serves(
    loaded: None, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_dispatch, "_TRITON_INSTALLED", False)
    assert ops.resolve_impl(None, x, op="swiglu") is ops.Impl.CUDA
    assert ops.resolve_impl(None, x, op="adapter_norm") is ops.Impl.REFERENCE
    assert ops.resolve_impl(None, x.double(), op="swiglu") is ops.Impl.REFERENCE


def test_what_stands_for_several_ops_is_chosen_by_measurement_alone(
    loaded: None, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention by somebody else may be faster, so that Triton is absent is no reason."""
    monkeypatch.setattr(_dispatch, "_TRITON_INSTALLED", False)
    assert ops.resolve_impl(None, x, op="rope_attention") is ops.Impl.REFERENCE
    measured = Choice("rope_attention", "9.0", "bfloat16", 768, 768, "rope_attention.json")
    monkeypatch.setattr(_cuda, "_MEASURED", (measured,))
    assert ops.resolve_impl(None, x, op="rope_attention") is ops.Impl.CUDA


def test_one_kernel_of_triton_is_chosen_by_measurement_alone(
    loaded: None, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ops.resolve_impl(None, x, op="gemm_swiglu") is ops.Impl.REFERENCE
    entries = [
        Choice("gemm_swiglu", capability, dtype, 768, 768, "gemm_swiglu.json")
        for capability in ("9.0", "8.0")
        for dtype in ("bfloat16", "float32")
    ]
    monkeypatch.setattr(_cuda, "_MEASURED", tuple(entries))
    assert ops.resolve_impl(None, x, op="gemm_swiglu") is ops.Impl.TRITON
    assert ops.resolve_impl(None, x.float(), op="gemm_swiglu") is ops.Impl.REFERENCE
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert ops.resolve_impl(None, x, op="gemm_swiglu") is ops.Impl.REFERENCE
    with pytest.raises(ValueError, match=r"needs compute capability 9 or 10, got 8\.0; pass"):
        ops.resolve_impl(ops.Impl.TRITON, x, op="gemm_swiglu")


def test_what_cannot_run_says_why_and_what_to_do(loaded: None, x: torch.Tensor) -> None:
    wide = x.new_empty(1, 1, 3080)
    refused = (
        ("adapter_norm", x, r"no CUDA C\+\+ kernel; pass impl=Impl\.TRITON"),
        ("swiglu", torch.ones(2, 8), r"need a CUDA tensor; pass impl=Impl\.REFERENCE"),
        ("swiglu", x.double(), r"take float16, bfloat16 and float32; pass impl=Impl\.TRITON"),
        ("sandwich_join", wide, r"at most 3072 wide; pass impl=Impl\.TRITON"),
    )
    for op, tensor, message in refused:
        with pytest.raises(ValueError, match=message):
            ops.resolve_impl(ops.Impl.CUDA, tensor, op=op)
    assert ops.resolve_impl(ops.Impl.CUDA, wide, op="swiglu") is ops.Impl.CUDA


def test_records_of_a_build_are_read(tmp_path: Path) -> None:
    record, library = tmp_path / "record.json", tmp_path / "_C.so"
    assert "was not installed" in _cuda.load(library, record).reason
    record.write_text(json.dumps({"built": False, "reason": "BLIP3O_FAST_CUDA=0"}))
    assert _cuda.load(library, record).reason.startswith("none: BLIP3O_FAST_CUDA=0; ")
    record.write_text(json.dumps({"built": True, "targets": ["80-real"], "nvcc": "13.0"}))
    assert "is missing, built for 80-real, nvcc 13.0" in _cuda.load(library, record).reason
    library.write_bytes(b"no library")
    build = _cuda.load(library, record)
    assert not build.loaded and "not loaded: " in build.reason


def test_without_a_build_asking_for_it_is_an_error(
    x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cuda, "_BUILD", CudaBuild(False, "none: because; BLIP3O_FAST_CUDA=1 ..."))
    with pytest.raises(ValueError, match=r"impl=CUDA on a .*768 on cuda.*none: because"):
        ops.swiglu(x, impl=ops.Impl.CUDA)
    assert ops.resolve_impl(None, x, op="swiglu") is ops.Impl.TRITON
