"""One evaluation of the network, and whole translations."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from blip3o_fast import ops
from blip3o_fast.benchmarking import work
from blip3o_fast.benchmarking.cases import Case, Contender, Task, check_agreement
from blip3o_fast.benchmarking.ceilings import DTYPES
from blip3o_fast.benchmarking.op_cases import has_impl
from blip3o_fast.benchmarking.shapes import Shape
from blip3o_fast.benchmarking.watch import Call, Prepared
from blip3o_fast.model.network import network as run_network
from blip3o_fast.ops import Impl
from blip3o_fast.pretrained import BLIP3oDiT
from blip3o_fast.sampling import SamplingPlan
from blip3o_fast.sampling.cache import find_engine
from blip3o_fast.sampling.hoisted import HoistedVelocity
from blip3o_fast.sampling.packed import PackedNetwork

TIME = 0.5
GRID = (0.0, TIME, 1.0)
"""The grid of two Euler steps. The second evaluation, at ``TIME``, is the one that is timed."""
GRAPHED_STEPS = 50
FP8 = torch.float8_e4m3fn
FP8_TOLERANCE = 0.2
"""With 3 bits of mantissa, base with random weights is off by 0.07. A wrong product is off by 1."""


class Network:
    """A model with random weights and inputs for it, made when first asked for and kept."""

    def __init__(self, shape: Shape, dtype: str, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, DTYPES[dtype], device
        self._made: tuple[BLIP3oDiT, Tensor, Tensor] | None = None
        self._velocity: Tensor | None = None

    def get(self) -> tuple[BLIP3oDiT, Tensor, Tensor]:
        """Model in evaluation mode, state ``[B, N, C]`` and condition ``[B, N, E]``."""
        if self._made is None:
            torch.manual_seed(0)
            config = self.shape.config
            with self.device:
                model = BLIP3oDiT(config).eval().to(self.dtype)
                size = (self.shape.batch, self.shape.tokens)
                x = torch.randn(*size, config.clip_embedding_size)
                eva = torch.randn(*size, config.eva_embedding_size)
            self._made = model, x, eva
        return self._made

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, bool]:
        """The arguments of a call of the model at ``TIME``, in its dtype."""
        _, x, eva = self.get()
        times = torch.full((self.shape.batch,), TIME, device=self.device)
        return x.to(self.dtype), times, eva.to(self.dtype), False

    def velocity(self) -> Tensor:
        """The expected result: the velocity at ``TIME`` by the reference, nothing hoisted."""
        if self._velocity is None:
            model, _, _ = self.get()
            with using(model, Impl.REFERENCE):
                self._velocity = model(*self.arguments())
        assert self._velocity is not None
        return self._velocity


def evaluation_cases(
    shape: Shape,
    dtype: str,
    device: torch.device,
    *,
    compiled: bool,
    published: Callable[[BLIP3oDiT], Call] | None = None,
) -> Iterator[Case]:
    """One evaluation of the velocity: hoisted and not, ours and by ``torch.compile``.

    ``published`` makes a call of the published implementation at this shape, on a model's device.
    """
    network = Network(shape, dtype, device)
    needed = work.evaluation(shape.config, shape.batch, DTYPES[dtype].itemsize)
    task = Task("evaluation", "evaluation", shape.name, dtype, needed, shape.batch)

    contenders = [
        Contender("plan", lambda: hoisted(network, None)),
        Contender("nothing hoisted", lambda: plain(network, None)),
    ]
    if device.type == "cuda":
        contenders += [
            Contender("plan, CUDA graph", lambda: graphed(network)),
            Contender("reference", lambda: plain(network, Impl.REFERENCE), False),
            Contender("reference, hoisted", lambda: hoisted(network, Impl.REFERENCE), False),
        ]
        if has_impl(Impl.CUDA, "rope_attention", DTYPES[dtype], device):
            contenders.append(
                Contender(
                    "plan, CUDA graph, rope in attention",
                    lambda: graphed(network, rope_attention=Impl.CUDA),
                )
            )
        if ops.e4m3_refusal(device) is None:
            contenders += [
                Contender("plan, FP8", lambda: hoisted(network, None, FP8)),
                Contender("plan, FP8, CUDA graph", lambda: graphed(network, FP8)),
            ]
    if compiled:
        reference = Impl.REFERENCE
        contenders += [
            Contender("torch.compile", lambda: plain(network, reference, compile_it=True), False),
            Contender(
                "torch.compile, hoisted",
                lambda: hoisted(network, reference, compile_it=True),
                False,
            ),
        ]
    if published is not None:

        def theirs() -> Prepared:
            return Prepared([published(network.get()[0])], kernel=False)

        contenders.append(Contender("published", theirs, False))
    yield Case(task, tuple(contenders))


def plain(network: Network, impl: Impl | None, *, compile_it: bool = False) -> Prepared:
    """One evaluation by the model itself, with adapter, keys, values and modulations."""
    model, _, _ = network.get()
    forward = _compiled(model, network.device) if compile_it else model
    arguments = network.arguments()

    def call() -> object:
        with using(model, impl):
            return forward(*arguments)

    check_agreement("evaluation, nothing hoisted", call(), network.velocity())
    return Prepared([call], kernel=False)


def hoisted(
    network: Network,
    impl: Impl | None,
    dtype: torch.dtype | None = None,
    *,
    compile_it: bool = False,
) -> Prepared:
    """One evaluation by the plan's own function, without a graph."""
    model, x, eva = network.get()
    dtype = dtype or network.dtype
    plan = SamplingPlan(model, steps=2, solver="euler", time_grid=GRID, dtype=dtype, impl=impl)
    trajectory = plan.start(eva, x.float())
    trajectory.row.fill_(GRID.index(TIME))
    velocity = trajectory.velocity
    assert isinstance(velocity, HoistedVelocity)
    if compile_it:
        velocity.run = _compiled_network(find_engine(model, dtype, impl).network, network.device)

    def call() -> object:
        with torch.no_grad():
            return trajectory.slope()

    tolerance = FP8_TOLERANCE if dtype is FP8 else 0.0
    check_agreement("evaluation, hoisted", call(), network.velocity(), tolerance)
    return Prepared([call], kernel=False)


def graphed(network: Network, dtype: torch.dtype | None = None, **per_op: Impl) -> Prepared:
    """A translation by ``GRAPHED_STEPS`` Euler steps. Each is a replay: evaluation and update.

    The figure is the time of a step. It contains a share of the preparation of the condition, so it
    is an upper bound.
    """
    model, x, eva = network.get()
    steps = GRAPHED_STEPS
    plan = SamplingPlan(model, steps=steps, solver="euler", dtype=dtype or network.dtype)

    def call() -> object:
        with using(model, None, **per_op):
            return plan(eva, noise=x)

    return Prepared([call], kernel=False, per_call=steps)


def generate_cases(
    shape: Shape, dtype: str, device: torch.device, *, steps: int, eager: bool = False
) -> Iterator[Case]:
    """A whole translation by Heun's method: the condition once, and two evaluations a step.

    On a GPU each evaluation is the replay of a graph. ``eager`` adds a contender without graph.
    """
    network = Network(shape, dtype, device)
    size = DTYPES[dtype].itemsize
    task = Task(
        "generate",
        f"{steps}-step Heun",
        shape.name,
        dtype,
        work.generation(shape, steps, "heun", size),
        shape.batch,
    )

    def prepare(**options: Any) -> Prepared:
        model, x, eva = network.get()
        plan = SamplingPlan(model, steps=steps, solver="heun", dtype=network.dtype, **options)
        return Prepared([lambda: plan(eva, noise=x)], kernel=False)

    contenders = [Contender("plan", prepare)]
    if eager:
        contenders.append(Contender("plan, no graph", lambda: prepare(graph=False)))
    yield Case(task, tuple(contenders))


@contextmanager
def using(model: BLIP3oDiT, impl: Impl | None, **per_op: Impl) -> Iterator[None]:
    """Run the ops of ``model`` by ``impl``, except those in ``per_op``, without gradients."""
    model.set_impl(impl, **per_op)
    try:
        with torch.no_grad():
            yield
    finally:
        model.set_impl(None)


def _compiled(module: Any, device: torch.device) -> Callable[..., Any]:
    """A module under ``torch.compile``; on a GPU with all tuning and CUDA graphs."""
    mode = "max-autotune" if device.type == "cuda" else "default"
    return _own_outputs(torch.compile(module, mode=mode, dynamic=False), device)


def _compiled_network(packed: PackedNetwork, device: torch.device) -> Callable[..., Any]:
    """The packed network under ``torch.compile``.

    Every replay copies the arguments that are neither parameters nor marked as static. Without the
    mark the compiled network would copy 180 MB of weights each time.
    """
    if device.type == "cuda":
        for tensor in packed.projections():
            torch._dynamo.mark_static_address(tensor)  # pyright: ignore[reportPrivateUsage]
    mode = "max-autotune" if device.type == "cuda" else "default"
    run = torch.compile(run_network, mode=mode, dynamic=False, fullgraph=True)
    return _own_outputs(run, device)


def _own_outputs(call: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """``call``, which lets compiled graphs overwrite the result of the last call."""
    if device.type != "cuda":
        return call

    def run(*args: Any, **options: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return call(*args, **options)

    return run
