"""A block, an evaluation of the network, and whole translations."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from blip3o_fast.benchmarking import work
from blip3o_fast.benchmarking.cases import Case, Contender, Task, check_agreement
from blip3o_fast.benchmarking.ceilings import DTYPES
from blip3o_fast.benchmarking.clock import Call, Prepared
from blip3o_fast.benchmarking.shapes import Shape
from blip3o_fast.flow import find_solver
from blip3o_fast.flow import time_grid as make_grid
from blip3o_fast.ops import Impl
from blip3o_fast.pretrained import BLIP3oDiT
from blip3o_fast.sampling import SamplingPlan, plain_velocity
from blip3o_fast.sampling.conditioning import condition
from blip3o_fast.sampling.engine import engine_key, find_engine
from blip3o_fast.sampling.evaluation import evaluate
from blip3o_fast.sampling.stepper import Method, Stepper

TIME = 0.5
GRAPHED_STEPS = 50


class Network:
    """A model with random weights and inputs for it, made when first asked for and kept."""

    def __init__(self, shape: Shape, dtype: str, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, DTYPES[dtype], device
        self._made: tuple[BLIP3oDiT, Tensor, Tensor] | None = None

    @property
    def parameters(self) -> int:
        """Of the model, without making it."""
        with torch.device("meta"):
            return BLIP3oDiT(self.shape.config).get_num_parameters()

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

    def free(self) -> None:
        """Forget the model."""
        self._made = None


def block_cases(
    shape: Shape, dtype: str, device: torch.device, *, compiled: bool
) -> Iterator[Case]:
    """One transformer block, forward, with its modulations computed from the time."""
    network = Network(shape, dtype, device)
    config, size = shape.config, DTYPES[dtype].itemsize
    one = config.replace(num_hidden_layers=1)
    rows = shape.batch * shape.tokens
    D, K, d = config.hidden_size, config.num_key_value_heads, config.head_dim
    kept = work.linear(rows, D, 2 * K * d, size)
    inner = [part for part in work.evaluation(one, shape.batch, size) if "put" not in part.name]
    task = Task("block", "forward", shape.name, dtype, work.total(inner) + kept, shape.batch)

    def prepare(impl: Impl | None, compile_it: bool) -> Prepared:
        model, _, _ = network.get()
        model.set_impl(impl)
        block, times = model.layers()[0], torch.full((shape.batch,), TIME, device=device)
        stream = torch.randn(shape.batch, shape.tokens, D, device=device, dtype=network.dtype)
        with torch.no_grad():
            activated = torch.nn.functional.silu(model.timestep_embedder(times))
            following = model.openings(activated)[1]
        cos, sin = model.rotary.cos, model.rotary.sin
        function: Any = _compiled(block, device) if compile_it else block

        def call() -> object:
            model.set_impl(impl)
            with torch.no_grad():
                return function(stream, stream, stream, activated, cos, sin, following)

        return Prepared([call])

    contenders = [Contender("fused ops", lambda: prepare(None, False))]
    if device.type == "cuda":
        contenders.append(Contender("reference", lambda: prepare(Impl.REFERENCE, False), False))
    if compiled:
        contenders.append(Contender("torch.compile", lambda: prepare(Impl.REFERENCE, True), False))
    yield Case(task, tuple(contenders))


def evaluation_cases(
    shape: Shape,
    dtype: str,
    device: torch.device,
    *,
    compiled: bool,
    published: Callable[[BLIP3oDiT], Call] | None = None,
) -> Iterator[Case]:
    """One evaluation of the velocity: hoisted and not, ours and by ``torch.compile``.

    ``published`` makes, of a model, a call of the published implementation at this shape.
    """
    network = Network(shape, dtype, device)
    needed = work.evaluation_floor(shape.config, shape.batch, DTYPES[dtype].itemsize)
    task = Task("evaluation", "evaluation", shape.name, dtype, needed, shape.batch)

    def plain(impl: Impl | None, compile_it: bool) -> Prepared:
        model, x, eva = network.get()
        run = plain_velocity(model, eva, guided=False)
        if compile_it:
            forward = _compiled(model, device)
            state, tokens = x.to(network.dtype), eva.to(network.dtype)
            times = torch.full((shape.batch,), TIME, device=device)
            return _inference(lambda: forward(state, times, tokens, False), model, impl)
        return _inference(lambda: run(x, TIME), model, impl)

    contenders = [
        Contender("plan", lambda: hoisted(network, None)),
        Contender("nothing hoisted", lambda: plain(None, False)),
    ]
    if device.type == "cuda":
        contenders += [
            Contender("plan, CUDA graph", lambda: graphed(network)),
            Contender("reference", lambda: plain(Impl.REFERENCE, False), False),
            Contender("reference, hoisted", lambda: hoisted(network, Impl.REFERENCE), False),
        ]
    if compiled:
        contenders += [
            Contender("torch.compile", lambda: plain(Impl.REFERENCE, True), False),
            Contender(
                "torch.compile, hoisted",
                lambda: hoisted(network, Impl.REFERENCE, compile_it=True),
                False,
            ),
        ]
    if published is not None:

        def theirs() -> Prepared:
            return Prepared([published(network.get()[0])], kernel=False)

        contenders.append(Contender("published", theirs, False))
    yield Case(task, tuple(contenders))


def hoisted(network: Network, impl: Impl | None, *, compile_it: bool = False) -> Prepared:
    """One evaluation by the plan's own function, every launch made by the host."""
    stepper, evaluation = make_stepper(network, impl)
    run = evaluation
    if compile_it:
        run = _compiled_evaluation(network, evaluation)
    arguments = (stepper.state, stepper.context, stepper.sites[0])
    with torch.no_grad():
        check_agreement("evaluation", run(*arguments), evaluation(*arguments))
    return Prepared([_no_grad(lambda: run(*arguments))], kernel=False)


def make_stepper(network: Network, impl: Impl | None) -> tuple[Stepper, Callable[..., Tensor]]:
    """A batch at the start of a step, its modulations in place, and the plan's evaluation."""
    model, x, eva = network.get()
    engine = find_engine(model, engine_key(model, network.dtype, impl, False))
    method = Method(find_solver("euler"), 1.0, None)
    with torch.no_grad():
        table = engine.table(model, make_grid("ascending", 2), method.solver, torch.float32)
        context = condition(engine.weights, engine.config, eva, guided=False, impls=engine.impls)
        stepper = Stepper(
            engine.evaluate,
            engine.weights.norms,
            method,
            table,
            x.float().clone(),
            context,
            engine.impls.solver_update,
        )
        stepper.advance()
    return stepper, cast("Callable[..., Tensor]", engine.evaluate)


def graphed(network: Network) -> Prepared:
    """A translation by ``GRAPHED_STEPS`` Euler steps, each a replay: an evaluation and an update.

    The preparation of the condition is spread over the steps, so the figure is an upper bound.
    """
    model, x, eva = network.get()
    steps = GRAPHED_STEPS
    plan = SamplingPlan(model, steps=steps, solver="euler", dtype=network.dtype)
    return Prepared([_no_grad(lambda: plan(eva, noise=x))], kernel=False, per_call=steps)


def generate_cases(
    shape: Shape, dtype: str, device: torch.device, *, steps: int, compiled: bool
) -> Iterator[Case]:
    """A whole translation by Heun's method: two evaluations a step, and the condition once."""
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
    if device.type == "cuda":
        contenders.append(Contender("plan, no graph", lambda: prepare(graph=False)))
    if compiled:
        contenders.append(Contender("plan, torch.compile", lambda: prepare(compile=True)))
    yield Case(task, tuple(contenders))


def _no_grad(call: Call) -> Call:
    def quiet() -> object:
        with torch.no_grad():
            return call()

    return quiet


def _inference(call: Call, model: BLIP3oDiT, impl: Impl | None) -> Prepared:
    def run() -> object:
        model.set_impl(impl)
        try:
            with torch.no_grad():
                return call()
        finally:
            model.set_impl(None)

    return Prepared([run], kernel=False)


def _compiled(module: Any, device: torch.device) -> Callable[..., Any]:
    """A module under ``torch.compile``, tuned as far as it goes on a GPU, graphs included."""
    mode = "max-autotune" if device.type == "cuda" else "default"
    return _own_outputs(torch.compile(module, mode=mode, dynamic=False), device)


def _compiled_evaluation(network: Network, evaluation: Callable[..., Tensor]) -> Callable[..., Any]:
    """The hoisted evaluation under ``torch.compile``; its weights stay where they are.

    Arguments that are not parameters are copied into the graph at every replay, unless they are
    marked as static: without the mark the compiler would be charged 180 MB of copies.
    """
    weights, config, impls = cast("partial[Tensor]", evaluation).args
    if network.device.type == "cuda":
        for tensor in _tensors(weights):
            torch._dynamo.mark_static_address(tensor)  # pyright: ignore[reportPrivateUsage]
    mode = "max-autotune" if network.device.type == "cuda" else "default"
    run = torch.compile(evaluate, mode=mode, dynamic=False, fullgraph=True)
    return _own_outputs(partial(run, weights, config, impls), network.device)


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple):
        for branch in tree:
            yield from _tensors(branch)
    elif isinstance(tree, torch.nn.Module):
        yield from tree.parameters()


def _own_outputs(call: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """Tell compiled graphs that the last result may be overwritten."""
    if device.type != "cuda":
        return call

    def run(*args: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return call(*args)

    return run
