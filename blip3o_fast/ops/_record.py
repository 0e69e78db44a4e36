"""The record of a fused op: all that dispatch, autograd, tests, benchmarks and tools know of it.

The file of an op ends in ``register(Op(...))``. Code that needs every op iterates over ``OPS``.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blip3o_fast.axes import check_shape
from blip3o_fast.ops._dispatch import DTYPES, Impl, check_tensors, choose, outside_autocast
from blip3o_fast.ops._specimens import Sizes

Arguments = tuple[Any, ...]
ANY = ("...",)


def takes_all(x: Tensor) -> None:
    """No reason to refuse any tensor."""
    del x


def like_first(x: Tensor, *others: Any) -> Tensor:
    """An empty tensor of the shape and dtype of the first argument."""
    del others
    return x.new_empty(x.shape)


class Operator(NamedTuple):
    """One operator that is registered with torch.

    Attributes:
        name: its name in ``torch.ops.blip3o_fast``.
        launcher: the function of ``blip3o_kernels`` that computes it with Triton.
        schema: its arguments and results.
        fake: from arguments to empty results, for tracing and for tensors without data.
    """

    name: str
    launcher: str
    schema: str
    fake: Callable[..., Any]


class Backward(NamedTuple):
    """The gradient of an op: the operator ``NAME_backward``.

    It takes, in this order, the gradients of the op's first ``results`` results and all that
    ``saved`` returns. If its schema ends in ``bool parameters``, it is also told whether a weight
    or a modulation needs a gradient. It returns the gradients of the op's first arguments.

    Attributes:
        schema: its arguments and results.
        saved: from the op's arguments and results to what the gradient needs, tensors first. Unless
            ``fake`` is given, the first of them have the shapes of the gradients.
        results: how many of the op's results have a gradient. The others are not differentiable.
        fake: from arguments to empty results. None makes results like the tensors of ``saved``.
    """

    schema: str
    saved: Callable[[Arguments, Arguments], Arguments] = lambda arguments, _: arguments
    results: int = 1
    fake: Callable[..., Any] | None = None

    @property
    def chooses(self) -> bool:
        """Whether the operator can leave out the gradients of parameters."""
        return "bool parameters" in self.schema

    def arguments(
        self, gradients: Arguments, arguments: Arguments, results: Arguments, parameters: bool
    ) -> Arguments:
        """The arguments of the operator, from the arguments and results of the op."""
        flag = (parameters,) if self.chooses else ()
        return *gradients[: self.results], *self.saved(arguments, results), *flag


class Fused(NamedTuple):
    """The operators of one fused implementation.

    Attributes:
        operators: by launcher, as torch dispatches them.
        kernels: the module of ``blip3o_kernels`` that they call, or None if they are C++.
        recorded: ``forward`` as a function that autograd records; None without a backward pass.
    """

    operators: Mapping[str, Callable[..., Any]]
    kernels: str | None
    recorded: Callable[..., Any] | None = None

    def find(self, launcher: str, arguments: Arguments) -> Callable[..., Any]:
        """The operator, or the Python function that it would call in the end.

        The function saves two passes through torch's dispatcher. It is not for tracing, profiling
        or tensors of another kind, which see operators only.
        """
        if self.kernels is None or _watched(arguments):
            return self.operators[launcher]
        return find_launcher(self.kernels, launcher)


_PLAIN = frozenset((Tensor, torch.nn.Parameter, float, int, bool, list, type(None)))
"""Types of plain arguments; a list holds numbers."""


def _watched(arguments: Arguments) -> bool:
    """Whether anything would miss an operator that did not pass through torch's dispatcher."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()  # pyright: ignore[reportPrivateImportUsage]
        or not _PLAIN.issuperset(map(type, arguments))
    )


@cache
def find_launcher(kernels: str, launcher: str) -> Callable[..., Any]:
    """A function of a kernel module, which is imported (with Triton) at the first call."""
    return getattr(import_module(f"blip3o_kernels.{kernels}"), launcher)


@dataclass(frozen=True, kw_only=True)
class Op:
    """One fused op. Every implementation takes the arguments of ``schema``, tensors first.

    Attributes:
        name: of the op, of its operator, and of its module in ``blip3o_kernels``.
        schema: its arguments and results.
        axes: the axes of each tensor argument, in order: ``{"x": "B N D", "w": "D"}``. ``"..."``
            allows any number of axes. With None, only ``require`` checks the shape. Tensors
            of three axes are rows of activations, all others are parameters.
        reference: the definition, in plain PyTorch.
        specimens: lists of arguments on which the op is tested, inspected and timed. The first one
            is typical.
        fake: from arguments to empty results.
        require: raises ``ValueError`` for bad arguments that ``axes`` cannot tell.
        backward: the gradient, or None.
        inplace: whether there is an operator ``NAME_`` that overwrites the first argument.
        quantised: whether there is an operator ``NAME_quantised``. It returns the last result as
            two: e4m3 and scales.
        aten: the op in few passes of ATen, for inference on a CPU, or None.
        triton: for a tensor, the reason why the Triton kernel does not take it, or None if it does.
            The field is None if there is no such kernel.
        cuda: the same of the CUDA C++ kernel.
        combines: whether one kernel does what several ops do. It runs where it is asked for by name
            or was measured to be faster. Elsewhere those ops run.
        flops: of given arguments; 0 for ops that memory bounds.
        fused: the registered implementations.
        differentiable: how many of the first arguments receive gradients.
        rows: how many of the first arguments are rows of activations.
    """

    name: str
    schema: str
    axes: Mapping[str, str | None]
    reference: Callable[..., Any]
    specimens: Callable[[Sizes], list[Arguments]]
    fake: Callable[..., Any] = like_first
    require: Callable[..., None] | None = None
    backward: Backward | None = None
    inplace: bool = False
    quantised: bool = False
    aten: Callable[..., Any] | None = None
    triton: Callable[[Tensor], str | None] | None = takes_all
    cuda: Callable[[Tensor], str | None] | None = None
    combines: bool = False
    flops: Callable[..., float] = lambda *_: 0.0
    fused: dict[Impl, Fused] = field(default_factory=dict, init=False, compare=False, repr=False)
    differentiable: int = field(init=False)
    rows: int = field(init=False)
    _letters: list[tuple[str, ...] | None] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        letters = [tuple(axes.split()) if axes else None for axes in self.axes.values()]
        found = {
            "_letters": letters,
            "rows": sum(axes == ANY or len(axes or ()) > 2 for axes in letters),
            "differentiable": 0 if self.backward is None else results_of(self.backward.schema),
        }
        for name, value in found.items():
            object.__setattr__(self, name, value)

    def __call__(self, *arguments: Any, impl: Impl | None = None, checked: bool = False) -> Any:
        """The results of the arguments of ``schema`` by ``impl``.

        An operator without results writes its last argument, which is returned. ``checked`` says
        that the caller has checked the arguments.
        """
        if not checked:
            self.check(*arguments)
        x = arguments[0]
        recording = torch.is_grad_enabled()
        if recording and len(self.axes) > self.differentiable:
            impl = self._without_loss(impl, arguments)
        impl = choose(self, impl, x)
        if impl is Impl.REFERENCE or impl is Impl.ATEN:
            plain = self.reference if impl is Impl.REFERENCE else self.aten
            assert plain is not None
            with outside_autocast(x):
                results = plain(*arguments)
        elif torch.compiler.is_compiling():
            results = self.fused[impl].operators["forward"](*arguments)
        elif recording and (recorded := self.fused[impl].recorded) is not None:
            results = recorded(*arguments)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                results = self.fused[impl].find("forward", arguments)(*arguments)
        return arguments[-1] if results is None else results

    def function(self, impl: Impl | None) -> Callable[..., Arguments]:
        """A function of the arguments that returns a tuple of the differentiable results.

        An op without a backward pass returns all of its results.
        """
        kept = None if self.backward is None else self.backward.results
        return lambda *arguments: as_tuple(self(*arguments, impl=impl))[:kept]

    def _without_loss(self, impl: Impl | None, arguments: Arguments) -> Impl | None:
        """``impl``. None becomes the reference if another implementation would lose a gradient."""
        tensors = list(zip(self.axes, arguments, strict=False))[self.differentiable :]
        lost = [name for name, x in tensors if x is not None and x.requires_grad]
        if not lost or impl is Impl.REFERENCE:
            return impl
        if impl is None:
            return Impl.REFERENCE
        raise ValueError(
            f"{', '.join(lost)}: expected no gradient to be needed, since impl={impl.name} of "
            f"{self.name} computes none; pass impl=Impl.REFERENCE or use torch.no_grad()"
        )

    def check(self, *arguments: Any) -> None:
        """Raise ``ValueError`` unless the arguments fit each other."""
        sizes: dict[str, int] = {}
        shapes: dict[tuple[str, ...], torch.Size] = {}
        device = arguments[0].device
        for name, letters, x in zip(self.axes, self._letters, arguments, strict=False):
            if x is None or letters is None:
                continue
            if letters != ANY:
                shape = x.shape
                if letters in shapes:
                    fits = shapes[letters] == shape
                else:
                    fits = len(shape) == len(letters)
                    for letter, size in zip(letters, shape, strict=False):
                        fits = fits and sizes.setdefault(letter, size) == size
                    shapes[letters] = shape
                if not fits:
                    check_shape(name, x, " ".join(letters), **sizes)
            if x.dtype not in DTYPES or x.device != device:
                check_tensors(**{next(iter(self.axes)): arguments[0], name: x})
        if self.require is not None:
            self.require(*arguments)

    @property
    def operators(self) -> list[Operator]:
        """The operators that an implementation may have; Triton has all of them."""
        arguments, _, _ = self.schema.partition(" -> ")
        found = [Operator(self.name, "forward", self.schema, self.fake)]
        if self.backward is not None:
            name, fake = f"{self.name}_backward", self.backward.fake or self._backward_fake
            found.append(Operator(name, "backward", self.backward.schema, fake))
        if self.inplace:
            schema = arguments.replace("(Tensor", "(Tensor(a!)", 1) + " -> ()"
            found.append(Operator(f"{self.name}_", "forward_", schema, lambda *_: None))
        if self.quantised:
            results = ", ".join(["Tensor"] * (results_of(self.schema) + 1))
            schema = f"{arguments} -> ({results})"
            name = f"{self.name}_quantised"
            found.append(Operator(name, "forward_quantised", schema, self._quantised_fake))
        return found

    def _backward_fake(self, *arguments: Any) -> Arguments:
        """Gradients like the saved tensors; of no elements where there is none to compute."""
        assert self.backward is not None
        saved = arguments[self.backward.results :][: self.differentiable]
        rows = self.differentiable if not self.backward.chooses or arguments[-1] else self.rows
        found = [
            saved[0].new_empty(0) if u is None or i >= rows else u.new_empty(u.shape)
            for i, u in enumerate(saved)
        ]
        return tuple(found) if len(found) > 1 else found[0]

    def _quantised_fake(self, *arguments: Any) -> Arguments:
        *others, h = as_tuple(self.fake(*arguments))
        values = h.new_empty(h.shape, dtype=torch.float8_e4m3fn)
        return *others, values, h.new_empty((*h.shape[:-1], 1), dtype=torch.float32)

    def work(self, *arguments: Any, backward: bool = False) -> tuple[float, int]:
        """Flops, and the bytes of all rows if each is read or written once.

        Parameters are left out: they are few beside the rows. Nothing is computed, so ``arguments``
        may be on the device ``meta``.
        """
        flops, results = self.flops(*arguments), as_tuple(self.fake(*arguments))
        if backward:
            assert self.backward is not None
            arguments = self.backward.arguments(results, arguments, results, parameters=True)
            results = as_tuple((self.backward.fake or self._backward_fake)(*arguments))
        tensors = [x for x in (*arguments, *results) if isinstance(x, Tensor)]
        return flops, sum(x.nbytes for x in tensors if x.dim() > 2)

    def calls(self, sizes: Sizes, impl: Impl = Impl.TRITON) -> Iterator[tuple[Operator, Arguments]]:
        """Every operator of ``impl`` with arguments to call it on, made from the specimens."""
        launch = self.fused[impl].operators
        for arguments in self.specimens(sizes):
            results = as_tuple(launch["forward"](*arguments))
            for operator in self.operators:
                if operator.launcher == "backward":
                    assert self.backward is not None
                    gradients = tuple(map(torch.randn_like, results))
                    for wanted in (True, False)[: 1 + self.backward.chooses]:
                        given = self.backward.arguments(gradients, arguments, results, wanted)
                        yield operator, given
                elif operator.launcher == "forward_":
                    yield operator, (arguments[0].clone(), *arguments[1:])
                elif operator.launcher == "forward" or results[-1].dim() > 2:
                    yield operator, arguments


def as_tuple(results: Any) -> Arguments:
    """The results of an operator as a tuple, whether it returns none, one or several."""
    return results if isinstance(results, tuple) else () if results is None else (results,)


def results_of(schema: str) -> int:
    """The number of results in a schema."""
    return schema.rpartition(" -> ")[2].count("Tensor")
