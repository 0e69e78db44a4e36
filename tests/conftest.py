"""Shared by all tests. Without a CUDA device, Triton kernels run in Triton's interpreter."""

import os
import tempfile
from pathlib import Path

import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    # One process a core: threads of several processes on the same cores wait for each other.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"

if capability := os.environ.get("ATEN_CPU_CAPABILITY"):
    # torch.compile's cache on disk would give one capability the code of another.
    cache = Path(tempfile.gettempdir()) / f"blip3o_inductor_{capability}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))

if not torch.cuda.is_available():
    # Read when @triton.jit decorates, so it must be set before anything imports a kernel.
    os.environ["TRITON_INTERPRET"] = "1"

import functools
import gc
import importlib.util
from collections.abc import Iterator

import numpy as np
import pytest


def _repair_interpreter() -> None:
    """Make the interpreter's casts round to nearest even, as devices do; it truncates to bf16.

    Make its products of bf16 those of the numbers; it multiplies their bits as integers.

    And let a device function call another without looking again through all of ``triton.language``
    for what an earlier call has patched, and let a reduction combine halves, as on a device, where
    it combines one element after another: most of the interpreter's time.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    def call(self, *args, **kwargs):
        names = self.fn.__globals__.values()
        visible = [lang for lang in (tl, tl.core) if any(value is lang for value in names)]
        if any(tl.core.is_builtin(lang.load) for lang in visible):
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    def convert(data, source, target, rounding_mode):
        del rounding_mode
        if source.name == "bf16" and target.name == "fp32":
            return data.astype(np.uint32) << 16
        if source.name == "fp32" and target.name == "bf16":
            wide = torch.from_numpy(np.ascontiguousarray(data))
            return wide.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
        if source.name == "fp32" and target.name == "fp8e4nv":
            wide = torch.from_numpy(np.ascontiguousarray(data)).clamp(-448, 448)
            return wide.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        raise NotImplementedError(f"{source} to {target}")

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        bits = convert(x.data, tl.bfloat16, tl.float32, None)
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return multiply(self, widened(a), widened(b), d, input_precision, max_num_imprecise_acc)

    def reduce(self, given):
        kinds = [x.dtype for x in given]
        axis = 0 if self.axis is None else self.axis
        parts = [x.handle.data.ravel() if self.axis is None else x.handle.data for x in given]
        parts = [np.moveaxis(x, axis, 0) for x in parts]
        while (half := len(parts[0]) // 2) > 0:
            halves = (part[of] for of in (slice(half), slice(half, None)) for part in parts)
            found = self.combine_fn.fn(*map(self.to_tensor, halves, 2 * kinds))
            parts = [x.handle.data for x in (found if isinstance(found, tuple) else (found,))]
        parts = [part[0] for part in parts]
        if self.keep_dims:
            kept = range(given[0].handle.data.ndim) if self.axis is None else axis
            parts = [np.expand_dims(part, kept) for part in parts]
        return list(map(self.to_tensor, parts, kinds))

    numbers = functools.cache(interpreter._get_np_dtype)  # it makes a table at every call
    interpreter._get_np_dtype = lambda dtype: (
        np.dtype(np.uint64) if dtype.scalar.is_ptr() else numbers(dtype.scalar)
    )
    multiply = interpreter.InterpreterBuilder.create_dot
    interpreter.ReduceOps.generic_reduce = reduce
    interpreter.InterpreterBuilder.create_dot = dot
    interpreter.InterpretedFunction.__call__ = call
    interpreter._convert_float = convert


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    _repair_interpreter()


def pytest_configure() -> None:
    """Choose where to compile before workers start, who inherit it: they share what they build."""
    from tests.csrc.build import folder

    folder()


def pytest_collection_finish() -> None:
    """Have garbage collections pass over what imports and collected tests left: 0.3 s for each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def any_cpu_samples_in_bf16() -> Iterator[None]:
    """Models sample in the dtype that a test names, whatever this CPU multiplies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("blip3o_fast.sampling.plan.cpu_has_bf16", lambda: True)
        yield


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, where kernels are interpreted, and a CUDA device where there is one."""
    return torch.device(request.param)


@pytest.fixture
def emulated_cuda(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """``impl=Impl.CUDA`` runs the kernels on the host, on CPU tensors; an entry a call."""
    from blip3o_fast.ops import OPS, Impl
    from tests.csrc.build import emulate_cuda

    emulate_cuda(monkeypatch)
    calls: list[None] = []

    def counted(function):
        return lambda *args: calls.append(None) or function(*args)

    for op in OPS.values():
        if (fused := op.fused.get(Impl.CUDA)) is not None:
            operators = {**fused.operators, "forward": counted(fused.operators["forward"])}
            recorded = fused.recorded and counted(fused.recorded)
            monkeypatch.setitem(
                op.fused, Impl.CUDA, fused._replace(operators=operators, recorded=recorded)
            )
    return calls


@pytest.fixture(scope="session")
def cpu_scales_rows() -> None:
    """Skips where the CPU's ``_scaled_mm`` takes one scale a tensor, as that of torch 2.11."""
    x, scales = torch.ones(16, 16).to(torch.float8_e4m3fn), torch.ones(16, 1)
    try:
        torch._scaled_mm(x, x.t(), scales, scales.t(), out_dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip(f"torch {torch.__version__} scales rows on a GPU alone")


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks of the preset tiny, training too, are of a model with few weights."""
    from blip3o_fast.benchmarking.shapes import Shape
    from blip3o_fast.config import PRESETS

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    monkeypatch.setitem(PRESETS, "tiny", {**PRESETS["tiny"], **sizes, **heads})
    config = Shape("tiny", 2, 16).config.replace(eva_embedding_size=64, clip_embedding_size=32)
    monkeypatch.setattr(Shape, "config", config)


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory holds NaN, so that a kernel that reads or leaves it unwritten shows."""

    def poison(allocate):
        def allocated(*args, **kwargs):
            x = allocate(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        return allocated

    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    yield


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect ``gpu`` tests without a device, and interpreted ones where there is one."""
    here, elsewhere = [], []
    for item in items:
        params = getattr(item, "callspec", None)
        interpreted = params is not None and params.params.get("device") == "cpu"
        absent = interpreted if torch.cuda.is_available() else item.get_closest_marker("gpu")
        (elsewhere if absent else here).append(item)
    if elsewhere:
        config.hook.pytest_deselected(items=elsewhere)
        items[:] = here
