"""``blip3o-fast doctor``: what would run here, and why.

Paste its output into a bug report.
"""

import argparse
import importlib.metadata
import json
import platform
from dataclasses import asdict, dataclass, fields

import torch

import blip3o_fast
from blip3o_fast import ops
from blip3o_fast.ops import ImplTable

REASONS = {
    ops.Impl.REFERENCE: "the specification in PyTorch",
    ops.Impl.ATEN: "few passes of PyTorch's kernels; the reference while a gradient is recorded",
}
OPTIONAL = {
    "triton": ("triton", "fused kernels on a GPU"),
    "flash-attn": (None, "attention; SDPA serves without it"),
    "transformers": ("extract", "extraction with CLIP ViT-L/14"),
    "huggingface_hub": ("hub", "loading from and pushing to the hub"),
    "pillow": ("images", "reading images"),
    "matplotlib": ("plots", "plots of reports"),
    "tensorboard": ("logging", "training curves"),
    "wandb": ("logging", "training curves"),
}
"""Distribution: extra that brings it, and what it is for."""

UNMEASURED = "nobody measured one kernel of both to be faster here"


@dataclass(frozen=True)
class Choice:
    """What an op runs on a device, and why."""

    op: str
    device: str
    runs: str
    why: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``doctor``."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Print versions, hardware, the implementation of every op, and optional packages."""
    versions = find_versions()
    choices = [*op_choices("cpu"), *(op_choices("cuda") if torch.cuda.is_available() else [])]
    packages = find_packages()
    if args.json:
        report = {
            "versions": versions,
            "ops": [asdict(choice) for choice in choices],
            "packages": packages,
        }
        print(json.dumps(report, indent=2))
        return 0
    print_section("versions", list(versions.items()))
    print_section("ops", [(f"{c.op} on {c.device}", f"{c.runs}: {c.why}") for c in choices])
    print_section("optional packages", list(packages.items()))
    return 0


def find_versions() -> dict[str, str]:
    """Versions and hardware, each as one line."""
    versions = {
        "blip3o_fast": blip3o_fast.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cpu threads": str(torch.get_num_threads()),
        "CUDA of torch": torch.version.cuda or "none: this torch was built for CPUs",
        "CUDA build": ops.cuda_build().reason,
    }
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            versions[f"GPU {index}"] = (
                f"{device.name}, sm_{device.major}{device.minor}, "
                f"{device.multi_processor_count} multiprocessors, "
                f"{device.total_memory / 2**30:.0f} GiB"
            )
    else:
        versions["GPU"] = "none that torch can use"
    return versions


def op_choices(device: str) -> list[Choice]:
    """The automatic choice for every op on ``device``, in inference."""
    sample = torch.empty(0, 256, 64, device=device, dtype=torch.float32)
    rows: list[Choice] = []
    for field in fields(ImplTable):
        if field.name == "rope_attention":
            continue
        with torch.no_grad():
            impl = ops.resolve_impl(None, sample, op=field.name)
        why = REASONS.get(impl, "fused kernel")
        if device == "cuda" and impl is ops.Impl.REFERENCE:
            why = "Triton is not installed: pip install 'blip3o-fast[triton]'"
        rows.append(Choice(field.name, device, impl.value, why))
    q = torch.empty(1, 256, 12, 64, device=device, dtype=torch.bfloat16)
    k = torch.empty(1, 256, 4, 64, device=device, dtype=torch.bfloat16)
    backend, reason = ops.attention_backend(q, k, k)
    rows.append(Choice("attention", device, backend.value, reason))
    packed = torch.cat((q, k, k), dim=2).flatten(2)
    one = ops.resolve_impl(None, packed, op="rope_attention") is ops.Impl.CUDA
    runs, why = ("cuda", "one kernel") if one else ("rope, then attention", UNMEASURED)
    rows.append(Choice("rope_attention", device, runs, why))
    refusal = ops.e4m3_refusal(sample.device)
    runs = "none" if refusal else "torch._scaled_mm"
    return [*rows, Choice("FP8 products", device, runs, refusal or "the hardware multiplies e4m3")]


def find_packages() -> dict[str, str]:
    """Every optional package: its version, or why it is absent and what it would serve."""
    found: dict[str, str] = {}
    for name, (extra, purpose) in OPTIONAL.items():
        try:
            found[name] = f"{importlib.metadata.version(name)} ({purpose})"
        except importlib.metadata.PackageNotFoundError:
            how = f"pip install 'blip3o-fast[{extra}]'" if extra else f"pip install {name}"
            found[name] = f"absent: not installed; for {purpose}: {how}"
    return found


def print_section(title: str, rows: list[tuple[str, str]]) -> None:
    """Aligned names and values under a title."""
    width = max(len(name) for name, _ in rows)
    print(f"{title}")
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")
