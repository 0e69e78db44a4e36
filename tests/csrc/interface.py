"""The C interface of ``kernels/csrc`` through ctypes, on CPU tensors and as differentiable ops.

``Kernels`` calls the launchers of a library whose kernels run on the host (``emulation.h``). Every
output lies between margins of NaN that must survive the call.
"""

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_float, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip3o_fast.reference import Modulation

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
MARGIN = 64


class Dtypes(Structure):
    _fields_ = [("activation", c_int), ("parameter", c_int)]


class Shape(Structure):
    _fields_ = [("batch", c_int64), ("tokens", c_int64), ("width", c_int64)]


class Rows(Structure):
    _fields_ = [("data", c_void_p), ("batch_stride", c_int64), ("row_stride", c_int64)]


class Heads(Structure):
    _fields_ = [
        ("data", c_void_p),
        ("batch_stride", c_int64),
        ("row_stride", c_int64),
        ("head_stride", c_int64),
    ]


class CModulation(Structure):
    _fields_ = [
        ("w1", c_void_p),
        ("w2", c_void_p),
        ("shift", c_void_p),
        ("scale", c_void_p),
        ("shift_stride", c_int64),
        ("scale_stride", c_int64),
    ]


class ModulationGrads(Structure):
    _fields_ = [("w1", c_void_p), ("w2", c_void_p), ("shift", c_void_p), ("scale", c_void_p)]


class Slopes(Structure):
    _fields_ = [("data", c_void_p), ("stride", c_int64), ("count", c_int64), ("slot", c_void_p)]


def signatures() -> dict[str, list[Any]]:
    """Argument types of every launcher, in the order of ``blip3o.h``; the last is the stream."""
    pointer, site = c_void_p, POINTER(CModulation)
    head = [Dtypes, Shape]
    return {
        "blip3o_sandwich_norm_forward": [
            *head,
            Rows,
            CModulation,
            c_float,
            pointer,
            pointer,
        ],
        "blip3o_sandwich_norm_backward": [
            *(*head, Rows, Rows, CModulation, c_float, pointer),
            *(ModulationGrads, pointer, pointer),
        ],
        "blip3o_sandwich_join_forward": [
            *(*head, Rows, Rows, pointer, site, site, c_float, pointer, pointer, pointer),
        ],
        "blip3o_sandwich_join_backward": [
            *(*head, Rows, Rows, Rows, Rows, pointer, site, site, c_float),
            *(pointer, pointer, pointer, ModulationGrads, ModulationGrads, pointer, pointer),
        ],
        "blip3o_rope": [
            *(*head, c_int, c_int, c_int, Heads, Heads, Heads, Heads),
            *(pointer, pointer, c_int, pointer),
        ],
        "blip3o_rope_attention": [
            *(c_int, Shape, c_int64, c_int, c_int, Rows, Rows, Rows),
            *(pointer, pointer, c_int, pointer, pointer),
        ],
        "blip3o_swiglu_forward": [c_int, Shape, Rows, pointer, pointer],
        "blip3o_swiglu_backward": [c_int, Shape, Rows, Rows, pointer, pointer],
        "blip3o_solver_update": [
            *(c_int, Shape, Rows, Rows, Slopes, pointer, pointer, c_float, pointer, pointer),
        ],
    }


def load(path: Path) -> ctypes.CDLL:
    """The library with its signatures declared."""
    library = ctypes.CDLL(str(path))
    for name, types in signatures().items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, c_int
    library.blip3o_sandwich_workspace.argtypes = [c_int, Shape, c_int]
    library.blip3o_sandwich_workspace.restype = c_int64
    return library


def rows(x: Tensor | None) -> Rows:
    """``x`` itself, or a copy where its last axis is strided."""
    if x is None:
        return Rows(None, 0, 0)
    dense = x if x.stride(-1) == 1 else x.contiguous()
    result = Rows(dense.data_ptr(), dense.stride(0), dense.stride(1))
    result.owner = dense
    return result


def heads(x: Tensor) -> Heads:
    """Heads ``[B, N, heads, d]``, or a copy where the last axis is strided."""
    dense = x if x.stride(-1) == 1 else x.contiguous()
    result = Heads(dense.data_ptr(), *dense.stride()[:3])
    result.owner = dense
    return result


def pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def modulation(site: Modulation) -> CModulation:
    strides = site.shift.stride(0), site.scale.stride(0)
    return CModulation(*(x.data_ptr() for x in site), *strides)


def grads(outputs: Sequence[Tensor | None]) -> ModulationGrads:
    return ModulationGrads(*(pointer(x) for x in outputs))


class Outputs:
    """Fresh tensors between margins of NaN; leaving the context looks at the margins."""

    def __init__(self) -> None:
        self._buffers: list[tuple[Tensor, int]] = []

    def new(self, shape: Sequence[int], dtype: torch.dtype, offset: int = 0) -> Tensor:
        """NaN everywhere; ``offset`` elements away from a 16-byte boundary."""
        count = torch.Size(shape).numel()
        buffer = torch.full((count + 2 * MARGIN,), torch.nan, dtype=dtype)
        self._buffers.append((buffer, count + offset))
        return buffer[MARGIN + offset : MARGIN + offset + count].view(*shape)

    def __enter__(self) -> "Outputs":
        return self

    def __exit__(self, kind: Any, *exc: Any) -> None:
        if kind is None:
            for buffer, end in self._buffers:
                assert buffer[:MARGIN].isnan().all(), "a kernel wrote before its output"
                assert buffer[MARGIN + end :].isnan().all(), "a kernel wrote past its output"


class Kernels:
    """The ops as functions of CPU tensors, differentiable where the library has a backward."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def run(self, name: str, *arguments: Any) -> None:
        code = getattr(self.library, f"blip3o_{name}")(*arguments, None)
        if code:
            raise RuntimeError(f"{name}: CUDA error {code}")

    def workspace(self, out: Outputs, dtypes: Dtypes, shape: Shape, sites: int) -> Tensor:
        floats = self.library.blip3o_sandwich_workspace(dtypes.activation, shape, sites)
        return out.new((floats,), torch.float32)

    def sandwich_norm(
        self,
        x: Tensor,
        w1: Tensor,
        w2: Tensor,
        shift: Tensor,
        scale: Tensor,
        *,
        eps: float = 1e-6,
    ) -> Tensor:
        return _SandwichNorm.apply(self, eps, x, w1, w2, shift, scale)

    def sandwich_join(
        self,
        x: Tensor,
        y: Tensor,
        layer_scale: Tensor | None,
        post: Modulation | None,
        pre: Modulation | None,
        *,
        eps: float = 1e-6,
    ) -> tuple[Tensor, Tensor | None]:
        none = (None,) * 4
        return _SandwichJoin.apply(self, eps, x, y, layer_scale, *(post or none), *(pre or none))

    def rope(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv: int, turned: int
    ) -> tuple[Tensor, ...]:
        return _Rope.apply(self, qkv, cos, sin, heads, kv, turned)

    def rope_attention(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, *, rotates_keys: bool
    ) -> Tensor:
        """q ``[B, N, H, d]``, k and v ``[B, M, K, d]`` with adjacent heads; ``[B, N, H, d]``."""
        B, N, H, d = q.shape
        M, K = k.shape[1:3]
        with Outputs() as out:
            result = out.new((B, N, H, d), q.dtype)
            sizes = (DTYPES[q.dtype], Shape(B, N, d), M, H, K)
            views = (rows(x.flatten(2)) for x in (q, k, v))
            tables = (pointer(cos), pointer(sin), rotates_keys)
            self.run("rope_attention", *sizes, *views, *tables, pointer(result))
        return result

    def swiglu(self, gate_up: Tensor) -> Tensor:
        return _Swiglu.apply(self, gate_up)

    def solver_update(
        self,
        x: Tensor,
        velocity: Tensor,
        slopes: Tensor,
        coefficients: Tensor,
        *,
        slot: Tensor | None = None,
        clamp: Tensor | None = None,
        guidance_scale: float = 1.0,
        out: Tensor | None = None,
    ) -> Tensor:
        """Slopes are copied between margins and back, so that stray writes to them show."""
        with Outputs() as outputs:
            result = outputs.new(x.shape, x.dtype) if out is None else out
            ring = outputs.new(slopes.shape, slopes.dtype).copy_(slopes)
            rows_of_ring = Slopes(pointer(ring), ring.stride(0), len(ring), pointer(slot))
            arguments = (rows(x), rows(velocity), rows_of_ring, pointer(coefficients))
            numbers = (pointer(clamp), guidance_scale, pointer(result))
            dtype = DTYPES[velocity.dtype]
            self.run("solver_update", dtype, Shape(*x.shape), *arguments, *numbers)
        slopes.copy_(ring)
        return result


class _SandwichNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Kernels, eps: float, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.kernels, ctx.eps = kernels, eps
        x, *site = tensors
        dtypes = Dtypes(DTYPES[x.dtype], DTYPES[site[0].dtype])
        with Outputs() as out:
            h = out.new(x.shape, x.dtype)
            kernels.run(
                *("sandwich_norm_forward", dtypes, Shape(*x.shape), rows(x)),
                *(modulation(Modulation(*site)), eps, pointer(h)),
            )
        return h

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Any, ...]:
        x, *site = ctx.saved_tensors
        dtypes = Dtypes(DTYPES[x.dtype], DTYPES[site[0].dtype])
        shape = Shape(*x.shape)
        with Outputs() as out:
            dx = out.new(x.shape, x.dtype)
            dsite = [out.new(u.shape, u.dtype) for u in site]
            ctx.kernels.run(
                *("sandwich_norm_backward", dtypes, shape, rows(dh), rows(x)),
                *(modulation(Modulation(*site)), ctx.eps, pointer(dx), grads(dsite)),
                pointer(ctx.kernels.workspace(out, dtypes, shape, 1)),
            )
        return None, None, dx, *dsite


class _SandwichJoin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Kernels, eps: float, *tensors: Any) -> Any:
        x, y, layer_scale, *sites = tensors
        post, pre = _site(sites[:4]), _site(sites[4:])
        with Outputs() as out:
            x_out = out.new(x.shape, x.dtype)
            h = None if pre is None else out.new(x.shape, x.dtype)
            kernels.run(
                *("sandwich_join_forward", _dtypes(tensors), Shape(*x.shape), rows(x), rows(y)),
                *(pointer(layer_scale), post, pre, eps, pointer(x_out), pointer(h)),
            )
        ctx.save_for_backward(x_out, *tensors[1:])
        ctx.kernels, ctx.eps = kernels, eps
        ctx.set_materialize_grads(False)
        return x_out, h

    @staticmethod
    def backward(ctx: Any, dx_out: Tensor | None, dh: Tensor | None) -> tuple[Any, ...]:
        x, y, layer_scale, *sites = ctx.saved_tensors
        dtypes, shape = _dtypes(ctx.saved_tensors), Shape(*x.shape)
        with Outputs() as out:
            dx, dy = out.new(x.shape, x.dtype), out.new(x.shape, x.dtype)
            dls, *dsites = (
                None if u is None else out.new(u.shape, u.dtype) for u in (layer_scale, *sites)
            )
            ctx.kernels.run(
                *("sandwich_join_backward", dtypes, shape, rows(dx_out)),
                *(rows(dh), rows(x), rows(y), pointer(layer_scale)),
                *(_site(sites[:4]), _site(sites[4:]), ctx.eps, pointer(dx), pointer(dy)),
                *(pointer(dls), grads(dsites[:4]), grads(dsites[4:])),
                pointer(ctx.kernels.workspace(out, dtypes, shape, 2)),
            )
        return None, None, dx, dy, dls, *dsites


def _site(tensors: Sequence[Tensor | None]) -> Any:
    present = [x for x in tensors if x is not None]
    return byref(modulation(Modulation(*present))) if present else None


def _dtypes(tensors: Sequence[Tensor | None]) -> Dtypes:
    given = [DTYPES[x.dtype] for x in tensors if x is not None]
    return Dtypes(given[0], given[2] if len(given) > 2 else given[0])


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: Kernels, qkv: Tensor, cos: Tensor, sin: Tensor, *counts: int
    ) -> Any:
        ctx.save_for_backward(cos, sin)
        ctx.kernels, ctx.counts, ctx.shape = kernels, counts, qkv.shape
        B, N, _ = qkv.shape
        with Outputs() as out:
            shapes = [(B, N, count, cos.shape[1]) for count in (counts[0], counts[1], counts[1])]
            apart = [out.new(shape, qkv.dtype) for shape in shapes]
            _turn(kernels, qkv, apart, cos, sin, *counts, adjoint=False)
        return tuple(apart)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        with Outputs() as out:
            dqkv = out.new(ctx.shape, gradients[0].dtype)
            tables = ctx.saved_tensors
            _turn(ctx.kernels, dqkv, gradients, *tables, *ctx.counts, adjoint=True)
        return None, dqkv, *(None,) * 5


def _turn(
    kernels: Kernels,
    packed: Tensor,
    apart: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    *counts: int,
    adjoint: bool,
) -> None:
    d = cos.shape[1]
    dtypes = Dtypes(DTYPES[packed.dtype], DTYPES[cos.dtype])
    shape = Shape(packed.shape[0], packed.shape[1], d)
    parts = [heads(x) for x in (packed.unflatten(-1, (counts[0] + 2 * counts[1], d)), *apart)]
    kernels.run("rope", dtypes, shape, *counts, *parts, pointer(cos), pointer(sin), adjoint)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Kernels, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.kernels = kernels
        B, N, W = gate_up.shape
        with Outputs() as out:
            result = out.new((B, N, W // 2), gate_up.dtype)
            shape = Shape(B, N, W // 2)
            arguments = (DTYPES[gate_up.dtype], shape, rows(gate_up), pointer(result))
            kernels.run("swiglu_forward", *arguments)
        return result

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        (gate_up,) = ctx.saved_tensors
        with Outputs() as out:
            result = out.new(gate_up.shape, gate_up.dtype)
            arguments = (Shape(*dout.shape), rows(dout), rows(gate_up), pointer(result))
            ctx.kernels.run("swiglu_backward", DTYPES[gate_up.dtype], *arguments)
        return None, result
