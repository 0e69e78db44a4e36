"""``blip3o-fast doctor``: what would run here, and why.

Paste its output into a bug report.
"""

import argparse
import importlib.metadata
import json
import platform
import textwrap
from dataclasses import asdict, dataclass
from itertools import zip_longest

import torch

import blip3o_fast
from blip3o_fast import ops
from blip3o_fast.benchmarking.environment import processor_name
from blip3o_fast.devices import cpu_has_bf16
from blip3o_fast.installation import install
from blip3o_fast.quantities import count

REASONS = {
    ops.Impl.REFERENCE: "the specification in PyTorch",
    ops.Impl.ATEN: "few passes of PyTorch's kernels; the reference while a gradient is recorded",
    ops.Impl.CUDA: "in eager calls, which cost the host less; graphs and compiled regions run "
    "triton until cuda was measured to be faster; BLIP3O_FAST_EAGER=triton changes it",
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

COLUMNS = 80
UNMEASURED = "nobody measured one kernel for all of them to be faster here"


@dataclass(frozen=True)
class Choice:
    """What an op runs on a device, and why."""

    op: str
    device: str
    runs: str
    why: str


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
        "CPU": f"{processor_name()}, {count(torch.get_num_threads(), 'thread')}",
        "bf16 on the CPU": "yes" if cpu_has_bf16() else "no: sampling computes in fp32 instead",
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
    """The automatic choice for every op on ``device``, in inference, and for what is no op."""
    rows: list[Choice] = []
    for op in ops.OPS.values():
        arguments = op.specimens(ops.Sizes(dtype=torch.bfloat16, device=device))[0]
        with torch.no_grad():
            impl = ops.resolve_impl(None, arguments[0], op=op.name)
        runs, why = impl.value, REASONS.get(impl, "fused kernel")
        if impl is ops.Impl.REFERENCE and op.combines:
            runs, why = "several ops", UNMEASURED
        elif impl is ops.Impl.REFERENCE and device == "cuda":
            why = f"Triton is not installed: {install('triton')}"
        rows.append(Choice(op.name, device, runs, why))
    q = torch.empty(1, 256, 12, 64, device=device, dtype=torch.bfloat16)
    k = torch.empty(1, 256, 4, 64, device=device, dtype=torch.bfloat16)
    for name, training in (("attention", False), ("attention in training", True)):
        backend, reason = ops.attention_backend(q.requires_grad_(training), k, k)
        rows.append(Choice(name, device, backend.value, reason))
    refusal = ops.e4m3_refusal(q.device)
    runs = "none" if refusal else "torch._scaled_mm"
    return [*rows, Choice("FP8 products", device, runs, refusal or "the hardware multiplies e4m3")]


def find_packages() -> dict[str, str]:
    """Every optional package: its version, or why it is absent and what it would serve."""
    found: dict[str, str] = {}
    for name, (extra, purpose) in OPTIONAL.items():
        try:
            found[name] = f"{importlib.metadata.version(name)} ({purpose})"
        except importlib.metadata.PackageNotFoundError:
            how = install(extra) if extra else f"pip install {name}"
            found[name] = f"absent; for {purpose}: {how}"
    return found


def print_section(title: str, rows: list[tuple[str, str]]) -> None:
    """Names and values under a title, in ``COLUMNS`` columns; a long word has a line of its own."""
    width = max(len(name) for name, _ in rows)
    print(title)
    for name, value in rows:
        lines = textwrap.wrap(
            value, COLUMNS - width - 4, break_long_words=False, break_on_hyphens=False
        )
        for label, line in zip_longest((name,), lines, fillvalue=""):
            print(f"  {label:<{width}}  {line}".rstrip())
