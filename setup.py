"""The optional CUDA build. All metadata is in pyproject.toml. torch is never imported.

``BLIP3O_FAST_CUDA``
    ``auto`` (default): build if nvcc, CMake and a torch with CUDA are found; ``1``: build, or
    fail, and ask the installer for a missing torch or CMake; ``0``: pure Python. One line says
    which.
``TORCH_CUDA_ARCH_LIST``
    Targets as torch spells them, ``"9.0a;10.0+PTX"``; the default is in ``cuda_targets``.
``MAX_JOBS``
    Compilers at a time; default: one a core, at most one for each 2 GiB of memory.
``BLIP3O_FAST_TORCH_INCLUDE``
    Folder that holds ``torch/csrc/stable``; default: that of the installed torch.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = "blip3o_fast"
LIBRARY = "_C"
RECORD = "_build_info.json"
OLDEST_NVCC = (12, 0)
OLDEST_CMAKE = (3, 24)
OLDEST_TORCH = (2, 10)


@dataclass(frozen=True)
class Plan:
    """The build. If ``reason`` is given, nothing is built."""

    reason: str = ""
    nvcc: str = ""
    nvcc_version: tuple[int, int] = (0, 0)
    cmake: str = ""
    torch_include: str = ""
    torch_version: str = ""
    targets: tuple[str, ...] = ()
    wanted: tuple[str, ...] = ()
    """What the installer must bring first."""


def make_plan() -> Plan:
    """Decide from the environment.

    Raises:
        SystemExit: if ``BLIP3O_FAST_CUDA=1`` asks for what cannot be built here.
    """
    mode = os.environ.get("BLIP3O_FAST_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"BLIP3O_FAST_CUDA: expected auto, 0 or 1, got {mode!r}")
    if mode == "0":
        return Plan(reason="BLIP3O_FAST_CUDA=0")
    nvcc = find_nvcc()
    version = nvcc_version(nvcc) if nvcc else (0, 0)
    missing = ""
    if not sys.platform.startswith("linux"):
        missing = f"the CUDA build is for Linux, not {sys.platform}"
    elif nvcc is None:
        missing = "nvcc was not found in CUDACXX, CUDA_HOME, PATH or /usr/local/cuda"
    elif version < OLDEST_NVCC:
        missing = f"{nvcc} is {dotted(version)}, {dotted(OLDEST_NVCC)} or newer is needed"
    if missing:
        if mode == "1":
            raise SystemExit(f"BLIP3O_FAST_CUDA=1: {missing}; BLIP3O_FAST_CUDA=0 installs without")
        return Plan(reason=missing)
    cmake, (include, torch, cuda) = find_cmake(), find_torch()
    if mode == "auto" and cuda == "None":
        return Plan("nvcc is here, but torch is without CUDA")
    wanted = () if cmake else (f"cmake>={dotted(OLDEST_CMAKE)}",)
    wanted += () if include else (f"torch>={dotted(OLDEST_TORCH)}",)
    if wanted and mode == "auto":
        needs = " and ".join(wanted)
        return Plan(reason=f"nvcc is here, {needs} is not")
    targets = cuda_targets(version, os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    return Plan("", str(nvcc), version, cmake, include, torch, targets, wanted)


def find_nvcc() -> Path | None:
    """The compiler that the environment names, else the first on the PATH, else the usual place."""
    if named := os.environ.get("CUDACXX"):
        found = shutil.which(named)
        return Path(found) if found else None
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [f"{home}/bin/nvcc" for home in homes] + ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((Path(found) for place in places if (found := shutil.which(place))), None)


def nvcc_version(nvcc: Path) -> tuple[int, int]:
    """(major, minor), (0, 0) where nvcc does not run."""
    return version_printed_by(str(nvcc), r"release (\d+)\.(\d+)")


def find_cmake() -> str:
    """A CMake that is new enough, or ''.

    One that pip installed lies beside Python, which need not be on the PATH. An isolated build sees
    scripts that do not run.
    """
    for folders in (None, str(Path(sys.executable).parent)):
        found = shutil.which("cmake", path=folders)
        if found and version_printed_by(found, r"cmake version (\d+)\.(\d+)") >= OLDEST_CMAKE:
            return found
    return ""


def version_printed_by(program: str, pattern: str) -> tuple[int, int]:
    """The two numbers that ``pattern`` finds in the output of ``program --version``."""
    try:
        printed = subprocess.run(
            [program, "--version"], capture_output=True, text=True, check=False
        ).stdout
    except OSError:
        return (0, 0)
    match = re.search(pattern, printed)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def find_torch() -> tuple[str, str, str]:
    """(folder of torch's headers, its version, its CUDA), or three empty strings.

    The CUDA of a torch for CPUs is ``None``.

    An isolated build does not see the torch of the environment that is installed into, but pip runs
    it with that environment's Python; the stable ABI does not care which torch lends the headers.
    """
    if named := os.environ.get("BLIP3O_FAST_TORCH_INCLUDE"):
        if not (Path(named) / "torch/csrc/stable/library.h").is_file():
            raise SystemExit(f"BLIP3O_FAST_TORCH_INCLUDE={named}: no torch/csrc/stable/library.h")
        return named, "unknown", ""
    spec = importlib.util.find_spec("torch")
    packages = list(spec.submodule_search_locations or ()) if spec else []
    packages += [f"{sysconfig.get_path(name)}/torch" for name in ("purelib", "platlib")]
    for package in map(Path, packages):
        version_file, include = package / "version.py", package / "include"
        if not (include / "torch/csrc/stable/library.h").is_file() or not version_file.is_file():
            continue
        facts = version_file.read_text()
        match = re.search(r"__version__ = '((\d+)\.(\d+)[^']*)'", facts)
        if match and (int(match[2]), int(match[3])) >= OLDEST_TORCH:
            cuda = re.search(r"^cuda\b[^=]*= '?([\w.]+)", facts, re.MULTILINE)
            return str(include), match[1], cuda[1] if cuda else ""
    return "", "", ""


def cuda_targets(version: tuple[int, int], listed: str) -> tuple[str, ...]:
    """CMake's targets for an nvcc of ``version``: those listed in torch's spelling, or the default.

    90a and 100a run on compute capability 9.0 and 10.0 alone, so the last default target is PTX,
    from which a driver compiles for every later device.
    """
    if not listed.strip():
        if version < (12, 8):
            return ("80-real", "89-real", "90a-real", "90-virtual")
        return ("80-real", "89-real", "90a-real", "100a-real", "100-virtual")
    targets: list[str] = []
    for item in re.split(r"[;,\s]+", listed.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", item)
        if match is None:
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST: expected items like 8.0, 9.0a or 10.0+PTX, got {item!r}"
            )
        major, minor, kind, ptx = match.groups()
        if int(major) < 8:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: 8.0 or newer is needed, got {item!r}")
        targets.append(f"{major}{minor}{kind}-real")
        if ptx:
            targets.append(f"{major}{minor}{kind}-virtual")
    return tuple(targets)


def dotted(version: tuple[int, int]) -> str:
    """'12.0'."""
    return f"{version[0]}.{version[1]}"


def jobs() -> int:
    """``MAX_JOBS``, or what the machine carries: nvcc takes up to 2 GiB a file."""
    if (given := os.environ.get("MAX_JOBS", "")).isdigit() and int(given) > 0:
        return int(given)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(len(os.sched_getaffinity(0)), memory >> 31))


def say(line: str) -> None:
    """One line that a build log shows."""
    sys.stderr.write(f"blip3o-fast: {line}\n")


def write_record(folder: Path, plan: Plan) -> None:
    """Leave beside the package what ``blip3o-fast doctor`` will say of this build."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {
        "built": not plan.reason,
        "reason": plan.reason,
        "targets": plan.targets,
        "nvcc": dotted(plan.nvcc_version) if not plan.reason else "",
        "torch_headers": plan.torch_version,
    }
    (folder / RECORD).write_text(json.dumps(facts, indent=2) + "\n")


PLAN = make_plan()


class BuildPython(build_py):
    """Records a build without CUDA; a library left over from another build goes."""

    def run(self) -> None:
        """Copy the packages and leave a record."""
        super().run()
        in_place = getattr(self, "editable_mode", False)
        folder = (ROOT if in_place else Path(self.build_lib)) / PACKAGE
        if PLAN.reason:
            (folder / f"{LIBRARY}.so").unlink(missing_ok=True)
            say(f"no CUDA build: {PLAN.reason}")
            write_record(folder, PLAN)


class BuildCuda(build_ext):
    """Configures and builds with CMake."""

    def get_ext_filename(self, fullname: str) -> str:
        """No Python in the name: the library holds operators, not a module."""
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Compile for every target of the plan."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cuda"
        configure = [
            *(PLAN.cmake, "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release"),
            f"-DCMAKE_CUDA_COMPILER={PLAN.nvcc}",
            f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(PLAN.targets)}",
            f"-DTORCH_INCLUDE_DIR={PLAN.torch_include}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
        ]
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        say(f"CUDA build for {', '.join(PLAN.targets)}")
        for command in (configure, [PLAN.cmake, "--build", str(build), "-j", str(jobs())]):
            if subprocess.run(command, check=False).returncode:
                raise SystemExit(
                    f"the CUDA build failed in: {' '.join(command)}; "
                    "the compiler's words are above (pip shows it with -v); "
                    "BLIP3O_FAST_CUDA=0 installs without"
                )
        write_record(target.parent, PLAN)

    def copy_extensions_to_source(self) -> None:
        """In an editable installation the record is copied too."""
        super().copy_extensions_to_source()
        write_record(ROOT / PACKAGE, PLAN)


class Wheel(bdist_wheel):
    """Any Python 3 may load the library, so the CUDA wheel names its platform alone."""

    def get_tag(self) -> tuple[str, str, str]:
        """(python, abi, platform)."""
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


if __name__ == "__main__":
    setup(
        ext_modules=[] if PLAN.reason else [Extension(f"{PACKAGE}.{LIBRARY}", sources=[])],
        cmdclass={"build_py": BuildPython, "build_ext": BuildCuda, "bdist_wheel": Wheel},
        setup_requires=list(PLAN.wanted),
    )
