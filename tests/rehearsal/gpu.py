"""A GPU that is not there: its tensors have shapes and no values, and nothing waits for it unseen.

Inside ``FakeGpu`` tensors on the CPU are real and tensors on ``cuda`` are torch's fake ones. Ops on
those are counted, not computed. Whatever the host asks of the device it is told at once (numbers
are 0, answers yes), and it is written down that a real device would have been waited for.

It takes a process of its own, which ``start`` starts: ``guard.cpp`` has to be loaded before torch,
and what ``torch.cuda`` says is changed for good.
"""

import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

from tests.rehearsal.streams import Device, Graph

HERE = Path(__file__).parent
SILENT = (
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("_unsafe_view", "lift_fresh", "_reshape_alias"),
)
"""Ops that launch nothing though they are not views."""

PROPERTIES = SimpleNamespace(
    name="no GPU, rehearsed as an H100",
    major=9,
    minor=0,
    L2_cache_size=1 << 20,  # small: what rotates to miss it takes few copies
    total_memory=80 << 30,
    multi_processor_count=132,
)


def compile_guard(folder: Path) -> Path:
    """The library to preload; raises ``FileNotFoundError`` without a compiler."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise FileNotFoundError("expected a C++ compiler, g++ or c++, on the PATH")
    home = Path(torch.__file__).parent
    target = folder / "guard.so"
    flags = ["-std=c++20", "-O0", "-fPIC", "-shared", "-w", f"-I{home}/include"]
    libraries = [f"-L{home}/lib", f"-Wl,-rpath,{home}/lib", "-ltorch_cpu", "-lc10"]
    subprocess.run(
        [compiler, *flags, str(HERE / "guard.cpp"), *libraries, "-o", str(target)], check=True
    )
    return target


def start(module: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m module``, which may make a ``FakeGpu``, to its end."""
    root = HERE.parents[1]
    paths = [str(root / folder) for folder in ("", "kernels", "tests", "benchmarks")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module]
    with TemporaryDirectory(prefix="blip3o-rehearsal-") as folder:
        environment["LD_PRELOAD"] = str(compile_guard(Path(folder)))
        return subprocess.run(
            command, env=environment, cwd=root, capture_output=True, text=True, check=False
        )


class Fakes(FakeTensorMode):
    """Fake tensors, which no op of a real device may touch, whatever ``is_available`` says."""

    @property
    def avoid_device_init(self) -> bool:
        """Never initialise a device."""
        return True


class Record:
    """What happened in a stretch of a program.

    Attributes:
        launches: by name of the op: everything that writes memory of the device.
        waits: what the host waited for the device for.
    """

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()
        self.waits: list[str] = []


class FakeGpu(TorchDispatchMode):
    """See the module.

    Attributes:
        records: open ones, of the thread that opened them and of autograd's.
        captures: a record of each graph that was captured.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fakes = Fakes(allow_non_fake_inputs=True)
        self.device = CapturingDevice(self)
        self.records: list[Record] = []
        self.captures: list[Record] = []
        self._lock = threading.RLock()  # a mode of fake tensors serves one thread at a time
        self._thread = threading.local()

    @contextmanager
    def recording(self) -> Iterator[Record]:
        """What happens inside the block."""
        record = Record()
        self.records.append(record)
        try:
            yield record
        finally:
            self.records.remove(record)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """In another thread: what it does is not recorded."""
        self._thread.unseen = True
        with self:
            yield

    @contextmanager
    def present(self) -> Iterator[None]:
        """Inside the block there is a GPU; for the rest of the process ``torch.cuda`` says so."""
        install(self)
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is a copy
        try:
            with self:
                yield
        finally:
            torch._C._set_only_lift_cpu_tensors(False)

    def waited(self, what: str) -> None:
        """The host waits for the device."""
        for record in self._seeing():
            record.waits.append(what)

    def launched(self, name: str) -> None:
        """The host launches an op."""
        for record in self._seeing():
            record.launches[name] += 1

    def _seeing(self) -> list[Record]:
        return [] if getattr(self._thread, "unseen", False) else self.records

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Fake what concerns the GPU, do what concerns the CPU."""
        options = dict(kwargs or {})
        tensors = list(_tensors((*args, *options.values())))
        device = options.get("device")
        named = device is not None and torch.device(device).type == "cuda"
        name = func.name().split("::")[1].split(".")[0]
        if not named and not any(isinstance(x, FakeTensor) for x in tensors):
            return self._on_host(func, name, args, options)
        if name == "_fused_sdp_choice":
            return SDPBackend.FLASH_ATTENTION.value  # decided on the host, as ``_flash`` below
        answer = ANSWERS.get(name)
        if answer is not None:
            self.waited(func.name())
            return answer(*args, **options)
        if name in COPIES:
            return self._copy(func, name, args, options)
        if any(x.device.type == "cpu" and x.dim() for x in tensors):
            self.waited(f"{func.name()} of a CPU tensor")
        if not (func.is_view or func.namespace == "prim" or name in SILENT):
            self.launched(func.name())
        with self._lock, self.fakes:
            return func(*args, **options)

    def _on_host(self, func: Any, name: str, args: Sequence[Any], options: dict[str, Any]) -> Any:
        """Done, but for random numbers, which take long and which nobody looks at."""
        if name in ("normal_", "uniform_"):
            return args[0]
        if name in ("randn", "rand"):
            func, options = torch.zeros, {k: options[k] for k in ("dtype",) if k in options}
        if options.get("pin_memory"):
            options["pin_memory"] = False  # there is nobody to lock pages for
        return func(*args, **options)

    def _copy(self, func: Any, name: str, args: Sequence[Any], options: dict[str, Any]) -> Any:
        """A copy, perhaps between devices; one from the device gives zeros, or yes."""
        inplace = name == "copy_"
        source = args[1] if inplace else args[0]
        here, there = source.device.type, torch.device(options.get("device") or source.device).type
        if inplace:
            there = args[0].device.type
        self.launched(func.name())
        asynchronous = options.get("non_blocking") or (inplace and args[2:] == (True,))
        if here != there and (not asynchronous or self.device.capturing is not None):
            self.waited(f"{func.name()} from {here} to {there}")
        if there == "cpu":
            dtype = options.get("dtype") or source.dtype
            target = args[0] if inplace else torch.empty(source.shape, dtype=dtype)
            return target.fill_(target.dtype is torch.bool)
        with self._lock, self.fakes:
            return func(*args, **options)


class CapturingDevice(Device):
    """Streams and graphs of a ``FakeGpu``, which records each capture."""

    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__()
        self.gpu = gpu
        self.waited = gpu.waited

    def begin(self, graph: Graph) -> None:
        """Begin a capture, and its record."""
        super().begin(graph)
        self.gpu.captures.append(Record())
        self.gpu.records.append(self.gpu.captures[-1])

    def end(self) -> None:
        """End both."""
        self.gpu.records.remove(self.gpu.captures[-1])
        super().end()


COPIES = ("_to_copy", "copy_")


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _number(x: Tensor) -> bool | int | float:
    if x.dtype is torch.bool:
        return True
    return 0.0 if x.is_floating_point() else 0


def _unique(x: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """As if all elements were distinct."""
    del rest, options
    index = {"dtype": torch.int64}
    return x.new_empty(x.numel()), x.new_empty(x.shape, **index), x.new_empty(x.numel(), **index)


ANSWERS: dict[str, Callable[..., Any]] = {
    "_local_scalar_dense": _number,
    "equal": lambda x, y: True,
    "_unique2": _unique,
    "nonzero": lambda x: x.new_empty((x.numel(), x.dim()), dtype=torch.int64),
}
"""What the host is told where it asks for a value, or for a shape that depends on values."""


class Generator(torch.Generator):
    """One of the CPU, whatever is asked: fakes draw nothing."""

    def __new__(cls, device: Any = "cpu") -> "Generator":
        del device
        return super().__new__(cls, "cpu")


def install(gpu: FakeGpu) -> None:
    """Have torch say what it says where there is a GPU, for the rest of the process."""
    gpu.device.install(setattr)
    nothing = {name: lambda *args, **options: None for name in SETTERS}
    zero = {name: lambda *args, **options: 0 for name in COUNTERS}
    known = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "is_bf16_supported": lambda *args, **options: True,
        "get_device_capability": lambda device=None: (PROPERTIES.major, PROPERTIES.minor),
        "get_device_properties": lambda device=None: PROPERTIES,
        "get_device_name": lambda device=None: PROPERTIES.name,
        "mem_get_info": lambda device=None: (PROPERTIES.total_memory,) * 2,
        "device": lambda device: nullcontext(),
    }
    for name, value in {**nothing, **zero, **known}.items():
        setattr(torch.cuda, name, value)
    # Lists of fakes go through one op, as lists of tensors do.
    torch.utils._foreach_utils._foreach_supported_types.append(FakeTensor)
    torch.backends.cuda.is_flash_attention_available = lambda: True
    torch.backends.cudnn.version = lambda: 91900
    fake_tensor.init_gpu_context = lambda device: None
    torch.Generator = Generator
    Tensor.record_stream = lambda self, stream: None
    FakeTensor.new_tensor = lambda self, data: torch.tensor(
        data, dtype=self.dtype, device=self.device
    )
    FakeTensor.data_ptr = lambda self: self.untyped_storage()._cdata
    F.scaled_dot_product_attention = _flash(F.scaled_dot_product_attention)
    swap = torch.utils.swap_tensors

    def swap_remembered(one: Tensor, other: Tensor) -> None:
        gpu.fakes.fake_tensor_converter.tensor_memo.clear()  # its weak references forbid a swap
        swap(one, other)

    torch.utils.swap_tensors = swap_remembered
    run = threading.Thread.run

    def run_beside(self: threading.Thread) -> None:
        with gpu.beside():
            run(self)

    threading.Thread.run = run_beside


SETTERS = (
    *("_lazy_init", "_sleep", "manual_seed", "manual_seed_all", "set_device"),
    *("reset_peak_memory_stats", "set_rng_state"),
)
COUNTERS = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")


def _flash(sdpa: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch's choice where there is a GPU: one kernel. Without one it has a formula alone."""

    def attention(q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Tensor:
        if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16):
            return sdpa(q, k, v, *args, **options)
        return torch.ops.aten._scaled_dot_product_flash_attention(
            q, k, v, options.get("dropout_p", 0.0)
        )[0]

    return attention
