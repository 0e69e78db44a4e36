"""What ``setup.py`` decides, and that its lists agree with the files beside them."""

import ctypes
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

from blip3o_fast.ops import _cuda
from tests.csrc import interface
from tests.packaging.building import load_script

pytest.importorskip("setuptools", minversion="77")

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "kernels" / "csrc"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``setup.py`` as a module; steering variables are cleared."""
    for name in ("BLIP3O_FAST_TORCH_INCLUDE", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "CUDACXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("BLIP3O_FAST_CUDA", "0")
    return load_script(ROOT / "setup.py")


def compiler(folder: Path, version: str) -> str:
    """An nvcc that only knows its version."""
    path = folder / "nvcc"
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.1'\n")
    path.chmod(0o755)
    return str(path)


def test_default_targets_cover_what_the_compiler_knows(script: ModuleType) -> None:
    assert script.cuda_targets((13, 0), "") == (
        *("80-real", "89-real", "90a-real", "100a-real", "100-virtual"),
    )
    assert script.cuda_targets((12, 4), "")[-2:] == ("90a-real", "90-virtual")


def test_targets_are_read_as_torch_spells_them(script: ModuleType) -> None:
    listed = script.cuda_targets((13, 0), "8.0;9.0a 10.0+PTX, 12.0")
    assert listed == ("80-real", "90a-real", "100-real", "100-virtual", "120-real")
    for wrong, why in (("Hopper", "'Hopper'"), ("7.5", "8.0 or newer")):
        with pytest.raises(SystemExit, match=why):
            script.cuda_targets((13, 0), wrong)


def test_auto_needs_a_compiler_that_is_new_enough(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BLIP3O_FAST_CUDA", "auto")
    monkeypatch.setenv("CUDACXX", compiler(tmp_path, "11.5"))
    assert "is 11.5, 12.0 or newer is needed" in script.make_plan().reason


def test_auto_asks_the_installer_for_nothing_and_1_for_what_is_missing(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDACXX", compiler(tmp_path, "13.0"))
    monkeypatch.setattr(script, "find_torch", lambda: ("", "", ""))
    monkeypatch.setattr(script, "find_cmake", lambda: "")
    monkeypatch.setenv("BLIP3O_FAST_CUDA", "auto")
    plan = script.make_plan()
    assert not plan.wanted and plan.reason.startswith("nvcc is here, cmake>=3.24 and torch>=2.10")
    monkeypatch.setenv("BLIP3O_FAST_CUDA", "1")
    plan = script.make_plan()
    assert not plan.reason and plan.wanted == ("cmake>=3.24", "torch>=2.10")


@pytest.mark.parametrize(
    ("line", "built"),
    [("cuda: Optional[str] = None", False), ("cuda: Optional[str] = '13.0'", True)],
    ids=["cpu", "cuda"],
)
def test_auto_compiles_only_for_a_torch_with_cuda(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str, built: bool
) -> None:
    package = tmp_path / "torch"
    header = package / "include/torch/csrc/stable/library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    (package / "version.py").write_text(f"__version__ = '2.11.0'\n{line}\n")
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(script.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("CUDACXX", compiler(tmp_path, "13.0"))
    monkeypatch.setattr(script, "find_cmake", lambda: "cmake")
    monkeypatch.setenv("BLIP3O_FAST_CUDA", "auto")
    plan = script.make_plan()
    assert (plan.reason == "") is built
    assert built or plan.reason.endswith("torch is without CUDA")
    monkeypatch.setenv("BLIP3O_FAST_CUDA", "1")
    assert script.make_plan().reason == ""


def test_cmake_is_found_beside_python(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where pip puts it; on the PATH there is none, or an old one."""
    path, beside = tmp_path / "path", tmp_path / "beside"
    for folder in (path, beside):
        folder.mkdir()
    monkeypatch.setenv("PATH", str(path))
    monkeypatch.setattr(script.sys, "executable", str(beside / "python"))
    assert script.find_cmake() == ""
    good = cmake(beside, "4.1.2")
    assert script.find_cmake() == good
    cmake(path, "3.20.0")
    assert script.find_cmake() == good
    on_path = cmake(path, "3.24.0")
    assert script.find_cmake() == on_path


def cmake(folder: Path, version: str) -> str:
    """A CMake that only knows its version."""
    path = folder / "cmake"
    path.write_text(f"#!/bin/sh\necho 'cmake version {version}'\n")
    path.chmod(0o755)
    return str(path)


def test_torch_is_found_without_importing_it(script: ModuleType) -> None:
    include, version, cuda = script.find_torch()
    assert cuda == str(torch.version.cuda)
    assert Path(include, "torch/csrc/stable/library.h").is_file()
    assert re.match(r"\d+\.\d+", version)
    assert "import torch" not in (ROOT / "setup.py").read_text()


@pytest.mark.parametrize("given, expected", [("3", 3), ("", None), ("many", None)])
def test_jobs(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, given: str, expected: int | None
) -> None:
    monkeypatch.setenv("MAX_JOBS", given)
    assert script.jobs() == expected if expected else script.jobs() >= 1


def test_a_mode_that_does_not_exist(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLIP3O_FAST_CUDA", "yes")
    with pytest.raises(SystemExit, match="expected auto, 0 or 1, got 'yes'"):
        script.make_plan()


def test_cmake_lists_every_source() -> None:
    listed = re.findall(r"\$\{SOURCES\}/(\w+\.(?:cu|cpp))", (ROOT / "CMakeLists.txt").read_text())
    assert set(listed) == {path.name for path in CSRC.iterdir() if path.suffix in (".cu", ".cpp")}


def test_python_knows_the_c_interface() -> None:
    """Names, and the number and kind of arguments, of every launcher."""
    header = re.sub(r"/\*.*?\*/", "", (CSRC / "blip3o.h").read_text(), flags=re.DOTALL)
    declared = re.findall(r"BLIP3O_API int (blip3o_\w+)\(([^)]*)\)", header)
    kinds = {"int": "c_int", "float": "c_float", "cudaStream_t": "c_void_p"}
    kinds |= {"int64_t": ctypes.c_int64.__name__}
    kinds |= {"blip3o_dtypes": "Dtypes", "blip3o_shape": "Shape", "blip3o_rows": "Rows"}
    kinds |= {"blip3o_modulation": "CModulation", "blip3o_slopes": "Slopes"}
    kinds |= {"blip3o_modulation_grads": "ModulationGrads", "blip3o_heads": "Heads"}

    def kind(argument: str) -> str:
        words = argument.replace("const", " ").split()
        if "blip3o_modulation*" in words:
            return "LP_CModulation"
        return "c_void_p" if "*" in argument else kinds[words[0]]

    expected = {name: [kind(a) for a in arguments.split(",")] for name, arguments in declared}
    known = {name: [t.__name__ for t in types] for name, types in interface.signatures().items()}
    assert known == expected
    assert f"#define BLIP3O_MAX_WIDTH {_cuda.WIDEST_NORM}\n" in header
