"""What the plans of one model share, and how they notice that its weights have changed.

An ``Engine`` holds the packed weights of a model in one dtype, time tables, and CUDA graphs. It has
no reference to the model. Engines are kept in a table with weak references to models: they are
freed with their model, never pickled or copied with it, and rebuilt when a weight has changed.

Memory: at most ``ENGINES`` engines a model. Each has packed weights (``sampling.packed``), at most
``TABLES`` time tables (``sampling.hoisted``), and CUDA graphs (``sampling.graph``).
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import astuple
from typing import Generic, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from blip3o_fast.config import DiTConfig
from blip3o_fast.flow import Solver, TimeGrid
from blip3o_fast.model import DiT
from blip3o_fast.model.network import network
from blip3o_fast.ops import Impl, ImplTable
from blip3o_fast.sampling.graph import GraphStore
from blip3o_fast.sampling.hoisted import TimeTable, time_table
from blip3o_fast.sampling.packed import PackedNetwork, pack, packable_modules, walk_modules, whole

ENGINES = 2
TABLES = 4

Key = TypeVar("Key")
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """The ``capacity`` values that were used last."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.values: OrderedDict[Key, Value] = OrderedDict()

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        """The value of ``key``, made if it is not there."""
        if key not in self.values:
            value = make()
            while len(self.values) >= self.capacity:
                self.values.popitem(last=False)
            self.values[key] = value
        self.values.move_to_end(key)
        return self.values[key]


class EngineKey(NamedTuple):
    """How the engines of one model differ. ``impls`` are the fields of an ``ImplTable``."""

    config: DiTConfig
    dtype: torch.dtype
    impls: tuple[Impl | None, ...]
    compiled: bool


class Engine:
    """Packed weights, and all that was made from them. ``find_engine`` makes it."""

    def __init__(self, model: DiT, key: EngineKey) -> None:
        self.network: PackedNetwork = pack(model, key.dtype, ImplTable(*key.impls))
        self.graphs = GraphStore()
        self.tables: Recent[object, TimeTable] = Recent(TABLES)
        self.lock = threading.RLock()
        self.batch_limit: int | None = None
        self.run: Callable[..., tuple[Tensor, Tensor]] = network
        if key.compiled:
            self.run = torch.compile(network, dynamic=False, fullgraph=True)

    @property
    def working_dtype(self) -> torch.dtype:
        """The dtype that decides the memory of activations: emulated FP8 computes in fp32."""
        emulated = self.network.quantised and emulates(self.network.impls)
        return torch.float32 if emulated else self.network.dtype

    def table(self, model: DiT, grid: TimeGrid, solver: Solver, dtype: torch.dtype) -> TimeTable:
        """The table of a solver on a grid; ``model`` must be the engine's own."""
        with self.lock:
            return self.tables.get(
                (grid, solver, dtype), lambda: time_table(model, self.network, grid, solver, dtype)
            )


class Fingerprint(NamedTuple):
    """A cheap summary of a model's weights. ``probes`` are views into them, ``seen`` their values.

    Every parameter is compared by address, version counter, dtype, device and shape. An optimizer
    step, an EMA swap or ``load_state_dict`` raises the counter. ``.to`` and ``assign=True`` change
    the address. A write through ``parameter.data`` raises no counter, so the middle element of
    every parameter is compared too. A write through ``.data`` that spares the middle element needs
    a call of ``forget``. Inference tensors have no counter. Their norms are compared, which reads
    all of them at every call.
    """

    facts: list[object]
    probes: tuple[Tensor, ...]
    seen: Tensor

    @classmethod
    def of(cls, modules: list[nn.Module]) -> "Fingerprint":
        """The fingerprint of the present weights of all modules of a model."""
        tensors = _local_tensors(modules)
        probes = tuple(_middle(x) for x in tensors if x.numel())
        return cls(_facts(tensors), probes, _values(tensors, probes))

    def matches(self, modules: list[nn.Module]) -> bool:
        """Whether they still have the same weights, with the same values."""
        tensors = _local_tensors(modules)
        if self.facts != _facts(tensors):
            return False
        return torch.equal(self.seen, _values(tensors, self.probes))


def _local_tensors(modules: list[nn.Module]) -> list[Tensor]:
    """Every parameter, or this process's shard of it."""
    parameters = [p for module in modules for p in module._parameters.values()]
    return [getattr(p, "_local_tensor", p) for p in parameters if p is not None]


def _facts(tensors: list[Tensor]) -> list[object]:
    return [
        (
            x.data_ptr(),
            None if x.is_inference() else x._version,
            x.dtype,
            x.device,
            x.shape,
            x.stride(),
        )
        for x in tensors
    ]


def _middle(x: Tensor) -> Tensor:
    return x.detach()[tuple(size // 2 for size in x.shape)].view(1)


def _values(tensors: list[Tensor], probes: tuple[Tensor, ...]) -> Tensor:
    """One element of each parameter, then norms of those without a version counter."""
    return torch.cat([*probes, *(x.detach().norm().view(1) for x in tensors if x.is_inference())])


class _ModelEngines:
    """The engines of one model; all have the same weights."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.seen: Fingerprint | None = None
        self.engines: Recent[EngineKey, Engine] = Recent(ENGINES)
        self.digest: str | None = None

    def refresh(self, modules: list[nn.Module]) -> None:
        """Drop everything that was made from other weights. The caller holds the lock."""
        if self.seen is None or not self.seen.matches(modules):
            self.engines.values.clear()
            self.digest = None
            self.seen = Fingerprint.of(modules)


_ENGINES: "WeakKeyDictionary[DiT, _ModelEngines]" = WeakKeyDictionary()
_LOCK = threading.Lock()


def impl_table(model: DiT, impl: Impl | None) -> ImplTable:
    """The model's own table, or ``impl`` for every op."""
    if impl is None:
        return model.impls
    table = ImplTable()
    table.set(impl)
    return table


def emulates(impls: ImplTable) -> bool:
    """Whether FP8 products are emulated, as they are if the ops before them are the reference."""
    return impls.sandwich_join is Impl.REFERENCE and impls.swiglu is Impl.REFERENCE


def weights_digest(model: DiT, *, seen: bool = False) -> str:
    """SHA-256 of the parameters in bf16, so that a model and its copy in bf16 agree.

    It is kept until the parameters change. ``seen``: ``find_engine`` has just looked whether they
    have, which is not done again.
    """
    own = _own_engines(model)
    with own.lock:
        if not seen:
            own.refresh(walk_modules(model))
        if own.digest is None:
            sha = hashlib.sha256()
            for name, parameter in sorted(model.named_parameters()):
                rows = whole(parameter).to("cpu", torch.bfloat16).contiguous()
                sha.update(f"{name} {list(rows.shape)}".encode())
                sha.update(rows.view(torch.uint8).numpy().tobytes())
            own.digest = sha.hexdigest()
        return own.digest


def find_engine(
    model: DiT, dtype: torch.dtype, impl: Impl | None = None, *, compiled: bool = False
) -> Engine:
    """The engine of a model's present weights. It is built if there is none.

    Raises:
        TypeError: if something else than its parameters decides what ``model`` computes.
    """
    key = EngineKey(model.config, dtype, astuple(impl_table(model, impl)), compiled)
    modules = packable_modules(model)
    own = _own_engines(model)
    with own.lock:
        own.refresh(modules)
        return own.engines.get(key, lambda: Engine(model, key))


def _own_engines(model: DiT) -> _ModelEngines:
    with _LOCK:
        return _ENGINES.setdefault(model, _ModelEngines())


def forget(model: DiT) -> None:
    """Free everything that sampling keeps for a model; the next call rebuilds it.

    Call it after writing weights through ``parameter.data``, which may go unnoticed.
    """
    with _LOCK:
        _ENGINES.pop(model, None)
