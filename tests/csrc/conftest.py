"""Builds ``kernels/csrc`` for the host, once a session."""

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.csrc.interface import Kernels, load

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "kernels" / "csrc").glob("*.cu"))


def cuda_headers() -> Path | None:
    """The toolkit's headers, which give g++ the 16-bit types."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    homes = (Path(nvcc).resolve().parents[1], Path("/usr/local/cuda"))
    found = (home / "include" for home in homes if (home / "include" / "cuda_bf16.h").exists())
    return next(found, None)


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """Every kernel, run on the host."""
    headers, compiler = cuda_headers(), shutil.which("g++")
    if headers is None or compiler is None:
        pytest.skip("needs g++ and the headers of a CUDA toolkit, found through nvcc on the PATH")
    folder = tmp_path_factory.mktemp("emulated")
    flags = ["-x", "c++", "-std=c++17", "-O0", "-fPIC", "-w", f"-I{headers}"]
    flags += ["-U_FORTIFY_SOURCE"]  # its longjmp refuses to leave a stack
    # A misaligned 16-byte access or an index overflow stops the process, as it would stop a GPU.
    flags += ["-fsanitize=alignment,bounds,signed-integer-overflow"]
    flags += ["-fsanitize-undefined-trap-on-error"]
    flags += ["-include", str(Path(__file__).with_name("emulation.h"))]

    def compiled(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        subprocess.run([compiler, *flags, "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, SOURCES))
    library = folder / "libkernels.so"
    subprocess.run([compiler, "-shared", *objects, "-o", str(library)], check=True)
    return Kernels(load(library))
