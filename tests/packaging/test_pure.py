"""Installation without CUDA: wheel, sdist, editable, metadata; in environments of their own."""

import json
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.packaging.building import (
    HIDDEN,
    clean_environment,
    copy_sources,
    hook,
    pip,
    share_installed,
)

pytest.importorskip("setuptools", minversion="77")

LOCATE = (
    "import importlib.util as u; "
    "print(*(u.find_spec(n).origin for n in ('blip3o_fast', 'blip3o_kernels')), sep='\\n')"
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_sources(tmp_path_factory.mktemp("pure") / "tree")


@pytest.fixture(scope="module")
def built(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A wheel, and what building it said."""
    target = tmp_path_factory.mktemp("wheels")
    result = hook(tree, "build_wheel", str(target), **HIDDEN)
    assert result.returncode == 0, result.stderr
    (wheel,) = target.glob("*.whl")
    return wheel, result.stderr


def test_wheel_without_nvcc_serves_every_platform(built: tuple[Path, str]) -> None:
    wheel, said = built
    assert wheel.name == "blip3o_fast-0.1.0-py3-none-any.whl"
    lines = [line for line in said.splitlines() if line.startswith("blip3o-fast:")]
    (line,) = lines
    assert line.startswith("blip3o-fast: no CUDA build: nvcc was not found")


def test_wheel_holds_both_packages_and_their_data(built: tuple[Path, str]) -> None:
    with zipfile.ZipFile(built[0]) as archive:
        names = set(archive.namelist())
        record = json.loads(archive.read("blip3o_fast/_build_info.json"))
    tops = {name.split("/")[0] for name in names}
    assert tops == {"blip3o_fast", "blip3o_kernels", "blip3o_fast-0.1.0.dist-info"}
    assert {
        "blip3o_fast/py.typed",
        "blip3o_kernels/py.typed",
        "blip3o_fast/ops/cuda_choices.json",
        "blip3o_fast/report/templates/evaluation.html",
        "blip3o_fast/report/templates/page.css",
        "blip3o_kernels/swiglu.py",
    } <= names
    assert not [name for name in names if name.endswith((".so", ".cu", ".cpp"))]
    assert not record["built"] and record["reason"].startswith("nvcc was not found")


def test_wheel_works_where_the_sources_are_not(built: tuple[Path, str], tmp_path: Path) -> None:
    home = tmp_path / "env"
    python = clean_environment(home)
    share_installed(home)
    result = pip(python, "install", str(built[0]))
    assert result.returncode == 0, result.stderr
    out = subprocess.run([python, "-c", LOCATE], cwd=tmp_path, capture_output=True, text=True)
    assert [Path(p).is_relative_to(home) for p in out.stdout.split()] == [True, True], out
    doctor = [str(home / "bin" / "blip3o-fast"), "doctor", "--json"]
    out = subprocess.run(doctor, cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert "nvcc was not found" in json.loads(out.stdout)["versions"]["CUDA build"]


def test_sdist_holds_what_every_build_needs(tree: Path, tmp_path: Path) -> None:
    result = hook(tree, "build_sdist", str(tmp_path), **HIDDEN)
    assert result.returncode == 0, result.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    (unpacked,) = (path for path in tmp_path.iterdir() if path.is_dir())
    for path in sorted((tree / "kernels").rglob("*")):
        if path.is_file() and path.suffix != ".pyc":
            assert (unpacked / path.relative_to(tree)).is_file(), path
    for name in ("CMakeLists.txt", "setup.py", "Makefile", "constraints.txt", "tests/conftest.py"):
        assert (unpacked / name).is_file(), name
    assert not (unpacked / "blip3o_fast" / "_build_info.json").exists()
    result = hook(unpacked, "build_wheel", str(tmp_path), **HIDDEN)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "blip3o_fast-0.1.0-py3-none-any.whl").is_file()


def test_editable_finds_both_packages_in_the_sources(tree: Path, tmp_path: Path) -> None:
    home = tmp_path / "env"
    python = clean_environment(home)
    share_installed(home)
    result = pip(
        *(python, "install", "--no-build-isolation", "--editable", str(tree)), BLIP3O_FAST_CUDA="0"
    )
    assert result.returncode == 0, result.stderr
    out = subprocess.run([python, "-c", LOCATE], cwd=tmp_path, capture_output=True, text=True)
    assert [Path(p).is_relative_to(tree) for p in out.stdout.split()] == [True, True], out
    record = json.loads((tree / "blip3o_fast" / "_build_info.json").read_text())
    assert record["reason"] == "BLIP3O_FAST_CUDA=0"


@pytest.mark.parametrize("mode", ["auto", "0"])
def test_metadata_with_nothing_installed(tree: Path, tmp_path: Path, mode: str) -> None:
    python = clean_environment(tmp_path / "env", "setuptools", "_distutils_hack")
    options = {"python": python, "BLIP3O_FAST_CUDA": mode}
    result = hook(tree, "get_requires_for_build_wheel", **options)
    assert result.stdout.strip().endswith("HOOK []"), result.stderr
    result = hook(tree, "prepare_metadata_for_build_wheel", str(tmp_path), **options)
    assert result.returncode == 0, result.stderr
    (metadata,) = tmp_path.glob("*.dist-info/METADATA")
    text = metadata.read_text()
    assert "Name: blip3o-fast\n" in text and "Requires-Dist: torch>=2.10\n" in text


def test_asking_for_cuda_without_nvcc_fails_in_one_line(tree: Path, tmp_path: Path) -> None:
    result = hook(tree, "build_wheel", str(tmp_path), BLIP3O_FAST_CUDA="1", **HIDDEN)
    assert result.returncode != 0
    (line,) = (line for line in result.stderr.splitlines() if "BLIP3O_FAST_CUDA=1" in line)
    assert "nvcc was not found" in line and "BLIP3O_FAST_CUDA=0 installs without" in line
