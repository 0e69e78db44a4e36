"""Builds ``kernels/csrc`` for the host: its kernels, and their operators."""

import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from blip3o_fast.ops import OPS, Impl, _dispatch
from blip3o_fast.ops._record import Fused
from blip3o_fast.ops._registration import bind

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "kernels" / "csrc"
SOURCES = sorted(CSRC.glob("*.cu"))


def host_compiler() -> tuple[str, Path]:
    """g++, and the toolkit's headers, which give it the 16-bit types; skips where either lacks."""
    nvcc, compiler = shutil.which("nvcc"), shutil.which("g++")
    homes = (Path(nvcc).resolve().parents[1], Path("/usr/local/cuda")) if nvcc else ()
    found = (home / "include" for home in homes if (home / "include" / "cuda_bf16.h").exists())
    headers = next(found, None)
    if headers is None or compiler is None:
        pytest.skip("needs g++ and the headers of a CUDA toolkit, found through nvcc on the PATH")
    return compiler, headers


FOLDER = "BLIP3O_FAST_EMULATED"
"""The environment variable that tells the processes of one run where the first of them builds."""


@cache
def folder() -> Path:
    """Where the processes of one run build; it goes with the first of them."""
    if FOLDER not in os.environ:
        os.environ[FOLDER] = _temporary().name
    return Path(os.environ[FOLDER])


@cache
def _temporary() -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="blip3o-emulated-")


@contextmanager
def _missing(target: Path) -> Iterator[bool]:
    """Whether ``target`` is still to be built, while no other process builds it."""
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield not target.exists()


@cache
def emulated_kernels() -> Path:
    """The library of every kernel, compiled for the host."""
    compiler, headers = host_compiler()
    library = folder() / "libkernels.so"
    flags = ["-x", "c++", "-std=c++17", "-O0", "-fPIC", "-w", f"-I{headers}"]
    flags += ["-U_FORTIFY_SOURCE"]  # its longjmp refuses to leave a stack
    # A misaligned 16-byte access or an index overflow stops the process, as it would stop a GPU.
    flags += ["-fsanitize=alignment,bounds,signed-integer-overflow"]
    flags += ["-fsanitize-undefined-trap-on-error"]
    for header in ("emulation.h", "emulated_tensor_core.h"):
        flags += ["-include", str(HERE / header)]

    def compiled(source: Path) -> str:
        object_file = str(library.with_name(f"{source.stem}.o"))
        subprocess.run([compiler, *flags, "-c", str(source), "-o", object_file], check=True)
        return object_file

    with _missing(library) as missing:
        if missing:
            with ThreadPoolExecutor(2) as pool:
                objects = list(pool.map(compiled, SOURCES))
            _link([compiler, "-shared", *objects], library)
    return library


def _link(command: list[str], target: Path) -> None:
    """Build a library that is whole as soon as it has its name."""
    part = target.with_suffix(".part")
    subprocess.run([*command, "-o", str(part)], check=True)
    part.rename(target)


def emulate_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """``impl=Impl.CUDA`` runs the kernels on the host, on CPU tensors."""
    for name, fused in host_operators().items():
        monkeypatch.setitem(OPS[name].fused, Impl.CUDA, fused)
    none = "this op has no CUDA C++ kernel"
    refusal = lambda op, x: none if op.cuda is None else op.cuda(x)  # noqa: E731
    monkeypatch.setattr(_dispatch, "_cuda_refusal", refusal)


@cache
def host_operators() -> dict[str, Fused]:
    """The operators of ``binding.cpp`` over those kernels, ``blip3o_fast_host``, by op."""
    kernels = emulated_kernels()
    compiler, headers = host_compiler()
    home = Path(torch.__file__).parent
    flags = ["-std=c++20", "-O0", "-fPIC", "-w", f"-I{headers}", f"-I{home}/include"]
    flags += ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    flags += ["-include", str(HERE / "host_torch.h"), "-shared", f"-Wl,-rpath,{folder()}"]
    sources = [str(CSRC / "binding.cpp"), str(HERE / "host_torch.cpp"), str(kernels)]
    libraries = [f"-L{home}/lib", "-Wl,--no-as-needed", "-ltorch"]
    target = folder() / "libbound.so"
    with _missing(target) as missing:
        if missing:
            _link([compiler, *flags, *sources, *libraries], target)
    torch.ops.load_library(target)
    ops = (op for op in OPS.values() if op.cuda is not None)
    return {op.name: bind(op, "blip3o_fast_host") for op in ops}
