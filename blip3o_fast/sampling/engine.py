"""What plans of one model share, and how they learn that it is out of date.

An ``Engine`` holds a model's packed weights in one dtype, the modulation tables made from them and
the CUDA graphs captured over them, but no reference to the model. Engines live in a table keyed
weakly by model: they die with it, are never pickled or copied with it, and are rebuilt when any of
its weights has changed.

Memory: at most ``ENGINES`` engines a model, each the packed weights (``sampling.weights``) and at
most ``TABLES`` modulation tables (``sampling.modulation``), plus CUDA graphs (``sampling.graph``).
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import astuple
from functools import partial
from typing import Generic, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch

from blip3o_fast.config import DiTConfig
from blip3o_fast.flow.schedule import TimeGrid
from blip3o_fast.flow.solvers import Solver
from blip3o_fast.model import DiT
from blip3o_fast.ops import Impl, ImplTable
from blip3o_fast.sampling.evaluation import evaluate
from blip3o_fast.sampling.freshness import Fingerprint, fingerprint
from blip3o_fast.sampling.graph import GraphStore
from blip3o_fast.sampling.modulation import linear_guesses, modulation_table
from blip3o_fast.sampling.stepper import Evaluate, StepTable, grid_times, step_table
from blip3o_fast.sampling.weights import PackedWeights, pack_weights

ENGINES = 2
TABLES = 4

Key = TypeVar("Key")
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """The ``capacity`` most recently used of the values that ``get`` made."""

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
    """What tells the engines of one model apart; ``impls`` are the fields of an ``ImplTable``."""

    config: DiTConfig
    dtype: torch.dtype
    impls: tuple[Impl | None, ...]
    compiled: bool


class Engine:
    """Packed weights, and what was made from them. Use ``find_engine``."""

    def __init__(self, model: DiT, key: EngineKey) -> None:
        self.config = key.config
        self.impls = ImplTable(*key.impls)
        self.weights: PackedWeights = pack_weights(model, key.dtype, self.impls)
        self.graphs = GraphStore()
        self.tables: Recent[object, StepTable] = Recent(TABLES)
        self.lock = threading.RLock()
        self.batch_limit: int | None = None
        run = torch.compile(evaluate, dynamic=False, fullgraph=True) if key.compiled else evaluate
        self.evaluate: Evaluate = partial(run, self.weights, self.config, self.impls)

    @property
    def working_dtype(self) -> torch.dtype:
        """The dtype that bounds the memory of activations: FP8 products are emulated in fp32."""
        emulated = self.weights.quantised and emulates(self.impls)
        return torch.float32 if emulated else self.weights.dtype

    def table(self, model: DiT, grid: TimeGrid, solver: Solver, dtype: torch.dtype) -> StepTable:
        """The modulations, lengths and ratios of a grid; ``model`` must be the engine's own."""

        def make() -> StepTable:
            times, rows = grid_times(grid, solver)
            wide = torch.promote_types(self.weights.dtype, torch.float32)
            modulations = modulation_table(model, times, wide)
            return step_table(modulations, linear_guesses(model, times, wide), grid, rows, dtype)

        with self.lock:
            return self.tables.get((grid, solver, dtype), make)


class _ModelEngines:
    """The engines of one model, all made from the same weights."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.seen: Fingerprint | None = None
        self.engines: Recent[EngineKey, Engine] = Recent(ENGINES)


_ENGINES: "WeakKeyDictionary[DiT, _ModelEngines]" = WeakKeyDictionary()
_LOCK = threading.Lock()


def engine_key(model: DiT, dtype: torch.dtype, impl: Impl | None, compiled: bool) -> EngineKey:
    """The key of a model's engine; ``impl`` None follows the model's own table."""
    return EngineKey(model.config, dtype, astuple(impl_table(model, impl)), compiled)


def impl_table(model: DiT, impl: Impl | None) -> ImplTable:
    """The model's own table, or ``impl`` for every op."""
    if impl is None:
        return model.impls
    table = ImplTable()
    table.set(impl)
    return table


def emulates(impls: ImplTable) -> bool:
    """Whether FP8 products are emulated: each goes with the op that computed its rows."""
    return impls.sandwich_join is Impl.REFERENCE and impls.swiglu is Impl.REFERENCE


def find_engine(model: DiT, key: EngineKey) -> Engine:
    """The engine of a model's present weights, built if there is none or they have changed."""
    with _LOCK:
        own = _ENGINES.setdefault(model, _ModelEngines())
    with own.lock:
        if own.seen is None or not own.seen.matches(model):
            own.engines.values.clear()
            own.seen = fingerprint(model)
        return own.engines.get(key, lambda: Engine(model, key))


def forget(model: DiT) -> None:
    """Free everything that sampling keeps for a model; the next call rebuilds it."""
    with _LOCK:
        _ENGINES.pop(model, None)
