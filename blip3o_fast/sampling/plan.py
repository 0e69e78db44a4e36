"""The sampler. Everything that does not depend on the state is computed before the loop.

    SamplingPlan(model, steps=50)(eva)        equals the plain model up to rounding

1. ``packed``: the weights of the network, packed and folded once for each model.
2. ``hoisted``: the condition, once for each sample; the modulations of all times, once for each
   grid; and the evaluation of the rest, at most 180 launches for base.
3. ``flow.trajectory``: the loop; ``graph``: one turn of the loop as a CUDA graph.
4. ``batches``: micro-batches; ``cache``: what the plans of one model share.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypedDict, cast

import torch
from torch import Tensor

from blip3o_fast.axes import check_shape
from blip3o_fast.devices import cpu_has_bf16
from blip3o_fast.flow import Callback, FittedSolver, Trajectory, choose_fitted, find_solver
from blip3o_fast.flow import time_grid as make_grid
from blip3o_fast.model import DiT
from blip3o_fast.ops import Impl, e4m3_refusal
from blip3o_fast.sampling.batches import Run, WorkingMemory, micro_batch, walk
from blip3o_fast.sampling.cache import (
    Engine,
    emulates,
    find_engine,
    impl_table,
    weights_digest,
)
from blip3o_fast.sampling.graph import GraphRun, bucket
from blip3o_fast.sampling.hoisted import Context, HoistedVelocity, TimeTable, condition
from blip3o_fast.sampling.inputs import (
    require_finite_samples,
    starting_noise,
    warn_of_bf16,
    warn_of_guidance,
)
from blip3o_fast.sampling.packed import E4M3
from blip3o_fast.words import GridName

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, E4M3)


class PlanOptions(TypedDict, total=False):
    """The options that ``generate`` passes on to ``SamplingPlan``, which documents them."""

    time_grid: GridName | Sequence[float] | None
    dtype: torch.dtype | None
    impl: Impl | None
    graph: bool | None
    compile: bool
    working_memory: WorkingMemory | None


def outside_graph(plan: "SamplingPlan", *arguments: object) -> Tensor:
    """Call ``plan`` outside of the graph that is being compiled.

    A plan has locks, caches and checks on the host, which no graph can hold. With
    ``fullgraph=True`` this is an error.
    """
    reason = "generate is no graph: pass compile=True to it instead"
    torch._dynamo.graph_break(msg=reason)  # pyright: ignore[reportPrivateUsage]
    return cast("Callable[..., Tensor]", torch.compiler.disable(plan))(*arguments)


class SamplingPlan:
    """``(eva, noise) -> clip`` for one model, solver and grid. Build once, call often.

    Plans of one model share its packed weights, so a second plan is cheap. If weights have changed
    since the last call, they are packed again. After writing weights through ``parameter.data``,
    call ``forget(model)``. Different plans may be called from different threads.

    Args:
        model: on any device, in training or evaluation mode; sampling never drops anything.
        steps: S, at least 1. A fitted solver has its own steps and takes None.
        solver: a name of ``flow.SOLVERS``, which say when to use them; a solver that ``fit_solver``
            made for this model; or ``fitted``: the solver of ``model.fitted`` with S evaluations.
        guidance_scale: weight of the condition over the empty condition; 1 is no guidance.
        time_grid: ascending, published or published_trainer, or S + 1 increasing times from 0 to 1;
            None follows the model's conventions.
        dtype: of weights and activations: float32, bfloat16, float16 or float64. None is that of
            autocast if it is on, and the model's own otherwise. The state is always fp32. A CPU
            that does not multiply bf16 computes in float32 instead, which is faster there.
            float8_e4m3fn multiplies most of each block in FP8 and computes the rest in bf16
            (``sampling.packed``). It costs accuracy. It needs an NVIDIA GPU of compute capability
            8.9 or at least 9.0, and widths that are multiples of 16. ``impl=Impl.REFERENCE``
            emulates it slowly on any device, to judge its quality.
        impl: of every fused op; None follows ``model.set_impl``.
        graph: replay each evaluation as a CUDA graph. None: on CUDA, unless ``compile``.
        compile: compile the network with ``torch.compile`` at the first call of each batch size.
        working_memory: bytes that a micro-batch may take, of at least one and at most 128 samples.
            None is 1 GiB on a CPU and 4 GiB on CUDA. ``"L2"`` keeps the activations of a
            micro-batch in the GPU's L2 cache.

    Raises:
        ValueError: on an unknown or impossible choice.
    """

    def __init__(
        self,
        model: DiT,
        *,
        steps: int | None = None,
        solver: str | FittedSolver = "heun",
        guidance_scale: float = 1.0,
        time_grid: GridName | Sequence[float] | None = None,
        dtype: torch.dtype | None = None,
        impl: Impl | None = None,
        graph: bool | None = None,
        compile: bool = False,
        working_memory: WorkingMemory | None = None,
    ) -> None:
        self.model, self.dtype, self.impl = model, dtype, impl
        self.graph, self.compile = graph, compile
        self.working_memory: WorkingMemory | None = working_memory
        self.guidance_scale = float(guidance_scale)
        if solver == "fitted":
            solver = choose_fitted(model.fitted, steps)
        if isinstance(solver, FittedSolver):
            if steps not in (None, len(solver)) or time_grid is not None:
                raise ValueError(
                    f"steps, time_grid: expected None for a fitted solver of {len(solver)} "
                    f"evaluations, got {steps} and {time_grid}"
                )
            self.solver, self.grid = solver, solver.grid
        else:
            if steps is None:
                raise ValueError("steps: expected a number, got None")
            named = model.config.rules.time_grid if time_grid is None else time_grid
            self.solver, self.grid = find_solver(solver), make_grid(named, steps)
        if not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale: expected a finite number, got {guidance_scale}")
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {DTYPES}, got {dtype}")
        if graph and compile:
            raise ValueError("graph: expected graph or compile, got both")
        if working_memory not in (None, "L2") and not (
            isinstance(working_memory, int) and working_memory >= 1
        ):
            raise ValueError(
                f'working_memory: expected at least 1 byte, or "L2", got {working_memory!r}'
            )

    def __call__(
        self,
        eva: Tensor,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        seeds: Sequence[int] | None = None,
        progress: bool = False,
        callback: Callback | None = None,
    ) -> Tensor:
        """Sample.

        Args:
            eva: ``[B, N, E]``, finite, on the model's device. For a model without a CLS token also
                with one, ``[B, N + 1, E]``, which is left out.
            noise: ``[B, N, C]`` to start from; None draws it.
            generator: source of the noise; a CPU generator gives the same noise on any device.
            seeds: one per sample, instead of a generator.
            progress: show a bar of steps.
            callback: called with (step, state) after each step, on a copy of the state. The
                micro-batches then advance together, and all their keys and values are kept.

        Returns:
            ``[B, N, C]`` in the dtype of ``eva``, divided by ``simple_scale_factor``.

        Raises:
            ValueError: on a wrong shape, dtype, device, NaN or option; ``NonFiniteSamples``, naming
                the samples, if the range of the dtype was left on the way.
            RuntimeError: if a CUDA graph cannot be captured.
            torch.OutOfMemoryError: if not even one sample fits.
        """
        if torch.compiler.is_compiling():
            return outside_graph(self, eva, noise, generator, seeds, progress, callback)
        model = self.model
        N, E = model.config.num_tokens, model.config.eva_embedding_size
        is_batch = isinstance(eva, Tensor) and eva.dim() == 3
        if is_batch and not model.config.has_cls and eva.shape[1] == N + 1:
            eva = eva[:, 1:]
        check_shape("eva_features", eva, "B N E", N=N, E=E)
        device = eva.device
        self.check_device(device)
        graph = self._uses_graph(device)
        warn_of_guidance(model, self.guidance_scale, stacklevel=2)
        x = starting_noise(model, eva, noise, generator, seeds)
        dtype = self._dtype(device)
        with torch.no_grad(), _on(device), torch.autocast(device.type, enabled=False):
            engine = find_engine(model, dtype, self.impl, compiled=self.compile)
            if isinstance(self.solver, FittedSolver):
                self.solver.check(
                    conventions=model.config.conventions,
                    guidance_scale=self.guidance_scale,
                    weights=weights_digest(model, seen=True),
                )
            table = engine.table(model, self.grid, self.solver, x.dtype)
            limit = micro_batch(
                model.config,
                engine.working_dtype,
                device,
                guided=self.guided,
                working_memory=self.working_memory,
            )
            out = torch.empty_like(x)
            with engine.graphs.running(device) if graph else nullcontext():
                engine.batch_limit = walk(
                    lambda part, shared: self._start(
                        engine, table, eva[part], x[part], graph, shared
                    ),
                    len(eva),
                    table.ends_step,
                    out,
                    limit=min(limit, engine.batch_limit or limit),
                    release=engine.graphs.clear,
                    progress=progress,
                    callback=callback,
                )
            samples = (out / model.config.simple_scale_factor).to(eva.dtype)
            require_finite_samples(samples, dtype)
            return samples

    @torch.no_grad()
    def start(self, eva: Tensor, x: Tensor) -> Trajectory:
        """The trajectory of one batch, without graph: ``advance`` it, or ask for its ``slope``.

        Args:
            eva: ``[B, N, E]`` on the model's device.
            x: noise ``[B, N, C]``, fp32 or fp64; the trajectory moves it.
        """
        dtype = self._dtype(eva.device)
        with _on(eva.device), torch.autocast(eva.device.type, enabled=False):
            engine = find_engine(self.model, dtype, self.impl, compiled=self.compile)
            table = engine.table(self.model, self.grid, self.solver, x.dtype)
            return self._trajectory(
                engine, table, x, condition(engine.network, eva, guided=self.guided)
            )

    def check_device(self, device: torch.device) -> None:
        """Raise ``ValueError`` if the plan asks for FP8 and ``device`` cannot multiply it."""
        refusal = self.refusal(device)
        if refusal is not None:
            raise ValueError(
                f"dtype=float8_e4m3fn: {refusal}; pass dtype=torch.bfloat16, or "
                "impl=blip3o_fast.ops.Impl.REFERENCE, which emulates FP8 to judge its quality"
            )

    def refusal(self, device: torch.device) -> str | None:
        """Why the plan, which asks for FP8, cannot run on ``device``; None if it can."""
        if self.dtype is not E4M3 or emulates(impl_table(self.model, self.impl)):
            return None
        refusal, config = e4m3_refusal(device), self.model.config
        heads = config.num_attention_heads + 2 * config.num_key_value_heads
        widths = config.hidden_size, config.intermediate_size, heads * config.head_dim
        if refusal is None and any(width % 16 for width in widths):
            refusal = f"expected widths D, I and (H + 2K) d in multiples of 16, got {widths}"
        return refusal

    @property
    def guided(self) -> bool:
        """Whether both halves of guidance are evaluated."""
        return self.guidance_scale != 1.0

    def _start(
        self,
        engine: Engine,
        table: TimeTable,
        eva: Tensor,
        noise: Tensor,
        graph: bool,
        shared: bool,
    ) -> Run:
        """Prepare a micro-batch for its first evaluation."""
        context = condition(engine.network, eva, guided=self.guided)
        x = noise.clone()
        if not graph:
            return self._trajectory(engine, table, x, context)
        size = bucket(len(x))

        def blank(table: TimeTable) -> tuple[Trajectory, Context]:
            empty = context.blank(size * (2 if self.guided else 1))
            rows = x.new_zeros(size, *x.shape[1:])
            return self._trajectory(engine, table, rows, empty), empty

        key = (size, table.solver.slots, self.guidance_scale, x.dtype)
        captured = engine.graphs.find(key, table, blank)
        return GraphRun(captured, table, x, context, shared=shared)

    def _trajectory(
        self, engine: Engine, table: TimeTable, x: Tensor, context: Context
    ) -> Trajectory:
        network = engine.network
        return Trajectory(
            HoistedVelocity(engine.run, network, table.modulations, context),
            table.solver,
            x,
            guidance_scale=self.guidance_scale,
            impl=network.impls.solver_update,
        )

    def _dtype(self, device: torch.device) -> torch.dtype:
        dtype = self.model.dtype if self.dtype is None else self.dtype
        if self.dtype is None and torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        if dtype is torch.bfloat16 and device.type == "cpu" and not cpu_has_bf16():
            warn_of_bf16()
            return torch.float32
        return dtype

    def _uses_graph(self, device: torch.device) -> bool:
        if self.graph is None:
            return device.type == "cuda" and not self.compile
        if self.graph and device.type != "cuda":
            raise ValueError(f"graph=True: CUDA graphs need a CUDA device, got {device}")
        return self.graph


def _on(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
