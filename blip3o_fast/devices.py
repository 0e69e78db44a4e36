"""Names of devices and element types, as options and files spell them."""

import torch

from blip3o_fast.errors import OptionError

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""Element types of models and shards by their short names."""


def find_device(name: str, option: str = "device") -> torch.device:
    """The device of that name: ``auto`` (CUDA where there is a GPU, else the CPU) or torch's names.

    Raises:
        OptionError: naming ``option``, for an unknown name or a CUDA device that is absent.
    """
    present = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda" if present else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise OptionError(f"{option}: expected auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cuda" and (device.index or 0) >= present:
        raise OptionError(
            f"{option}: expected one of the {present} CUDA devices that torch finds, got {name!r}"
        )
    return device


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 itself; where it does not, fp32 is several times faster.

    No if torch cannot tell.
    """
    tell = getattr(torch.cpu, "get_capabilities", dict)
    return bool(tell().get("avx512_bf16", False))
