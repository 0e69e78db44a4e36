"""Copies of the source tree, environments with little in them, and builds in both."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
SOURCES = (
    *("pyproject.toml", "setup.py", "MANIFEST.in", "CMakeLists.txt", "LICENSE", "Makefile"),
    "README.md",
    *("constraints.txt", "CONTRIBUTING.md", "train_dit.py", "eval_blip3o_coco.py"),
    *("blip3o_fast", "kernels", "tests"),
)
HIDDEN = {"CUDACXX": "/nonexistent/nvcc"}
"""The environment of a machine without nvcc, wherever it lies."""


def copy_sources(target: Path) -> Path:
    """The tree as a clone has it: nothing built."""
    target.mkdir(parents=True)
    ignore = shutil.ignore_patterns("__pycache__", "golden", "*.so", "_build_info.json")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=ignore)
        elif source.is_file():
            shutil.copy(source, target / name)
    return target


def load_script(path: Path) -> ModuleType:
    """A file outside the packages as a module."""
    spec = importlib.util.spec_from_file_location(f"{path.stem}_script", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    return module


def environment(**settings: str) -> dict[str, str]:
    """This one without what steers the build, then ``settings``."""
    steering = ("BLIP3O_FAST_", "CUDA", "TORCH_", "MAX_JOBS", "PYTHONPATH")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(steering)}
    return {**kept, **settings}


def hook(tree: Path, name: str, *arguments: str, python: str = sys.executable, **settings: str):
    """Run a build hook as an installer does, in a process of its own."""
    call = f"import setuptools.build_meta as b; print('HOOK', b.{name}(*{arguments!r}))"
    return subprocess.run(
        [python, "-c", call],
        cwd=tree,
        env=environment(**settings),
        capture_output=True,
        text=True,
        check=False,
    )


def clean_environment(folder: Path, *packages: str) -> str:
    """A Python that sees the standard library and ``packages`` of this one alone; its path."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = site_packages(folder)
    for package in packages:
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.origin is not None, package
        home = Path(spec.origin).parent
        for path in (home, *home.parent.glob(f"{package}-*.dist-info")):
            (site / path.name).symlink_to(path)
    return str(folder / "bin" / "python")


def site_packages(folder: Path) -> Path:
    """Where a virtual environment keeps its packages."""
    paths = sysconfig.get_paths(scheme="venv", vars={"base": str(folder)})
    return Path(paths["purelib"])


def share_installed(folder: Path) -> None:
    """Let a clean environment see what is installed here, torch first of all.

    Editable installations are left out: their import hooks work in site-packages only.
    """
    (site_packages(folder) / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")


def pip(python: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run this environment's pip on another, without a network."""
    command = [sys.executable, "-m", "pip", "--python", python, *arguments]
    return subprocess.run(
        [*command, "--no-deps", "--no-index", "--disable-pip-version-check"],
        env=environment(**settings),
        capture_output=True,
        text=True,
        check=False,
    )
