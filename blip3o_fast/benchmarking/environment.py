"""Where a measurement was made: device, driver, clocks, versions, commit."""

import contextlib
import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import blip3o_fast

PACKAGES = (
    *("torch", "triton", "numpy", "liger-kernel", "quack-kernels"),
    *("apex", "flash-attn", "flash-attn-4", "flash_attn_3"),
)

COMMIT = "BLIP3O_FAST_COMMIT"
"""The variable that names the commit, for a copy of a clone without its history."""


def describe_environment(device: torch.device) -> dict[str, Any]:
    """JSON-ready facts. Runs compare only if their ``device`` is the same.

    ``clocks`` are those that nvidia-smi shows now (None on a CPU). ``load`` is the present load
    average of the machine. ``commit`` and ``changed`` are those of ``describe_commit``.
    """
    versions = {"blip3o_fast": blip3o_fast.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    versions["torch"] = torch.__version__  # names the build, which the metadata may leave out
    commit, changed = describe_commit()
    return {
        "device": device_name(device),
        "device_type": device.type,
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "load": [round(x, 2) for x in os.getloadavg()],
        "driver": _nvidia("driver_version") if device.type == "cuda" else None,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "clocks": clocks() if device.type == "cuda" else None,
        "platform": platform.platform(),
        "versions": versions,
        "commit": commit,
        "changed": changed,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def describe_commit() -> tuple[str | None, bool | None]:
    """The commit that the library runs from, and whether files differ from it.

    Outside a clone it is the value of the environment variable ``BLIP3O_FAST_COMMIT``, or None.
    """
    commit, changed = find_commit(Path(__file__).resolve().parents[2])
    return commit or os.environ.get(COMMIT), changed


def find_commit(root: Path) -> tuple[str | None, bool | None]:
    """The commit of the clone at ``root``, and whether files differ from it.

    None if ``root`` is not the top of a clone: an installed library may lie in the virtual
    environment of another project's clone, whose commit means nothing here.
    """
    top = _output("git", "-C", str(root), "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root:
        return None, None
    changed = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return _output("git", "-C", str(root), "rev-parse", "HEAD"), bool(changed)


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's and how many threads torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{processor_name()}, {threads} thread{'s' * (threads > 1)}"


def processor_name() -> str:
    """The processor as Linux names it, or as Python does."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def clocks() -> dict[str, str | None]:
    """Clocks, power and temperature of the GPU, as nvidia-smi prints them."""
    fields = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu")
    return {field: _nvidia(field) for field in fields}


def _nvidia(field: str) -> str | None:
    return _output("nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader")


def _output(*command: str) -> str | None:
    """The output of a command, or None if there is no such command or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
