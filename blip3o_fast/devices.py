"""Names of devices and element types, as options and files spell them; the device of no values."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

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


@contextmanager
def no_values() -> Iterator[None]:
    """A module made inside has parameters on ``meta``, for the tensors of a checkpoint to replace.

    Nothing is initialised. To draw random numbers on ``meta`` torch would import its compiler,
    which takes seconds.
    """
    with torch.device("meta"), _NoInit():
        yield


class _NoInit(TorchFunctionMode):
    """The functions of ``torch.nn.init`` leave tensors as they are."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else options["tensor"]
        return func(*args, **options)
