"""The CUDA build on a machine with nvcc, whether or not it has a GPU."""

import ctypes
import json
import re
import resource
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch

from tests.csrc import interface
from tests.packaging.building import (
    clean_environment,
    copy_sources,
    hook,
    load_script,
    pip,
    share_installed,
)

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")

pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="needs nvcc"),
    pytest.mark.timeout(1800),
]

STABLE = re.compile(r"(aoti_torch|torch)_[a-z0-9_]+")
"""The C shims, which are all that torch promises to keep."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A CUDA wheel for every default target, and the CPU seconds that it took."""
    pytest.importorskip("setuptools", minversion="77")
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake")
    folder = tmp_path_factory.mktemp("cuda")
    tree = copy_sources(folder / "tree")
    begin = cpu_seconds()
    result = hook(tree, "build_wheel", str(folder), BLIP3O_FAST_CUDA="1", MAX_JOBS="2")
    assert result.returncode == 0, result.stdout + result.stderr
    warned = re.findall(r".*(?:csrc|ptxas).*warning.*", result.stdout + result.stderr)
    assert not warned, warned
    (built,) = folder.glob("*.whl")
    return built, cpu_seconds() - begin


def cpu_seconds() -> float:
    """What the compilers have used, which does not depend on who else uses the machine."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.fixture(scope="module")
def library(wheel: tuple[Path, float]) -> Path:
    with zipfile.ZipFile(wheel[0]) as archive:
        return Path(archive.extract("blip3o_fast/_C.so", wheel[0].parent))


@pytest.mark.slow
def test_wheel_is_tagged_for_its_platform_alone(wheel: tuple[Path, float]) -> None:
    path, seconds = wheel
    assert re.fullmatch(r"blip3o_fast-[\d.]+-py3-none-linux_\w+\.whl", path.name)
    assert seconds < 2 * 300, f"five minutes on two cores are exceeded: {seconds:.0f} CPU seconds"
    with zipfile.ZipFile(path) as archive:
        record = json.loads(archive.read("blip3o_fast/_build_info.json"))
    assert record["built"] and record["targets"][-1].endswith("-virtual")


@pytest.mark.slow
def test_only_stable_symbols_of_torch_are_used(library: Path) -> None:
    listed = subprocess.run(
        ["nm", "--dynamic", "--undefined-only", str(library)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    symbols = {line.split()[-1] for line in listed.stdout.splitlines()}
    strange = {
        s for s in symbols
        if not STABLE.fullmatch(s) and re.search(r"torch|at\d|c10|cuda|^cu[A-Z]", s)
    }  # fmt: skip
    assert not strange
    weak = {line.split()[-1] for line in listed.stdout.splitlines() if line.split()[-2] == "w"}
    assert "aoti_torch_get_current_cuda_stream" in weak, "a torch for CPUs could not load it"


@pytest.mark.slow
def test_installed_wheel_says_what_it_is(wheel: tuple[Path, float], tmp_path: Path) -> None:
    python = clean_environment(tmp_path / "env")
    share_installed(tmp_path / "env")
    assert pip(python, "install", str(wheel[0])).returncode == 0
    code = "from blip3o_fast import ops; print(ops.cuda_build())"
    out = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "loaded=True" in out.stdout and "90a-real" in out.stdout, out
    if torch.version.cuda is None:
        assert "is without CUDA" in out.stdout, out
        code = (
            "import torch; from blip3o_fast import ops; "
            "ops.swiglu(torch.ones(2, 8), impl=ops.Impl.CUDA)"
        )
        out = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert (
            "ValueError: swiglu: impl=CUDA on" in out.stderr and "need a CUDA tensor" in out.stderr
        )


@pytest.mark.slow
def test_editable_installation_holds_the_library(tmp_path: Path) -> None:
    tree = copy_sources(tmp_path / "tree")
    python = clean_environment(tmp_path / "env")
    share_installed(tmp_path / "env")
    arguments = ("install", "--no-build-isolation", "--editable", str(tree))
    for mode, outcome in (("1", "loaded=True"), ("0", "BLIP3O_FAST_CUDA=0")):
        settings = {"BLIP3O_FAST_CUDA": mode, "TORCH_CUDA_ARCH_LIST": "9.0a"}
        result = pip(python, *arguments, **settings)
        assert result.returncode == 0, result.stderr
        code = "from blip3o_fast import ops; print(ops.cuda_build())"
        out = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert outcome in out.stdout, out


@pytest.mark.slow
def test_no_spills_and_wide_accesses(library: Path) -> None:
    inspect_cuda = load_script(ROOT / "kernels" / "inspect_cuda.py")
    cuobjdump = inspect_cuda.find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("needs cuobjdump, which the CUDA toolkit and Triton bring")
    rows = list(inspect_cuda.inspect(library, cuobjdump))
    assert {row.arch for row in rows} == {"sm_80", "sm_89", "sm_90a", "sm_100a"}
    assert sum(row.vectorised for row in rows) > 4 * 30
    assert not [row for row in rows if row.faults]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_launchers_without_a_gpu_return_an_error(tmp_path: Path) -> None:
    """An error code, no crash; and nothing to do is success."""
    target = tmp_path / "libkernels.so"
    sources = [str(ROOT / "kernels" / "csrc" / f"{name}.cu") for name in ("rope", "swiglu")]
    flags = ["-std=c++17", "-arch=sm_80", "-shared", "-cudart=static", "-Xcompiler=-fPIC"]
    subprocess.run([str(NVCC), *flags, *sources, "-o", str(target)], check=True)
    library = ctypes.CDLL(str(target))
    rows = interface.Rows(None, 64, 64)
    for tokens, works in ((2, False), (0, True)):
        shape = interface.Shape(1, tokens, 32)
        code = library.blip3o_swiglu_forward(0, shape, rows, None, None)
        assert (code == 0) is works, code
        dtypes = interface.Dtypes(0, 0)
        heads = (interface.Heads(None, 64, 64, 32),) * 4
        code = library.blip3o_rope(dtypes, shape, 1, 0, 1, *heads, None, None, 0, None)
        assert (code == 0) is works, code
