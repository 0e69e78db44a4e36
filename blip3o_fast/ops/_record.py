"""The record of a fused op: what dispatch, autograd, tests, benchmarks and tools know about it.

The file of an op ends in ``register(Op(...))``. Everything that must know all ops iterates over
``OPS``.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blip3o_fast.axes import check_shape
from blip3o_fast.ops._dispatch import DTYPES, Impl, check_tensors, choose, outside_autocast
from blip3o_fast.ops._specimens import Sizes

Arguments = tuple[Any, ...]
ANY = ["..."]


def like_first(x: Tensor, *others: Any) -> Tensor:
    """The result of an op that maps rows to rows like them."""
    del others
    return x.new_empty(x.shape)


class Operator(NamedTuple):
    """A registered operator.

    Attributes:
        name: in ``torch.ops.blip3o_fast``.
        launcher: the function of ``blip3o_kernels`` that computes it with Triton.
        schema: arguments and results.
        fake: the results for tensors without data.
    """

    name: str
    launcher: str
    schema: str
    fake: Callable[..., Any]


class Backward(NamedTuple):
    """The gradient of an op: the operator ``NAME_backward``, and what it is given.

    Its arguments are the gradients of the first ``results`` results of the op, what ``saved``
    returns (tensors first), and, where the schema ends so, ``bool parameters``: whether anything
    but rows needs a gradient. It returns the gradients of the first arguments of the op.

    Attributes:
        schema: arguments and results.
        saved: what to keep of the arguments and the results of the op: first, for each gradient
            that the operator returns, a tensor like it.
        results: how many results of the op have a gradient; others are for ``saved`` or reading.
        fake: the results for tensors without data, where ``saved`` does not hold the like of them.
    """

    schema: str
    saved: Callable[[Arguments, Arguments], Arguments] = lambda arguments, _: arguments
    results: int = 1
    fake: Callable[..., Any] | None = None

    @property
    def chooses(self) -> bool:
        """Whether the gradients of parameters may be left out."""
        return "bool parameters" in self.schema

    def arguments(
        self, gradients: Arguments, arguments: Arguments, results: Arguments, parameters: bool
    ) -> Arguments:
        """What the operator is given, from what the op was given and returned."""
        flag = (parameters,) if self.chooses else ()
        return *gradients[: self.results], *self.saved(arguments, results), *flag


class Fused(NamedTuple):
    """The operators of one implementation by launcher, and the differentiable forward."""

    operators: Mapping[str, Callable[..., Any]]
    apply: Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Op:
    """One fused op. Every implementation takes the arguments of ``schema``, tensors first.

    Attributes:
        name: of the op, of its operator, and of its module of ``blip3o_kernels``.
        schema: arguments and results.
        axes: of the tensors among the arguments, in order: ``{"x": "B N D", "w": "D"}``. ``"..."``
            is any, and a tensor of None is checked by ``require`` alone. Tensors of three axes are
            rows of activations, the others are parameters.
        reference: the definition, in plain PyTorch.
        specimens: lists of arguments to test, inspect and time the op on, the typical one first.
        fake: the results for tensors without data.
        require: raises ``ValueError`` for arguments that fit ``axes`` and are wrong all the same.
        backward: None where no gradient is recorded.
        inplace: whether there is ``NAME_``, which overwrites the first argument.
        quantised: whether there is ``NAME_quantised``, whose last result is e4m3 and its scales.
        aten: the op in few passes of ATen, for inference on a CPU, or None.
        triton: whether there is a Triton kernel. An op without one can be done by several others.
        cuda: why the CUDA C++ kernel does not take a tensor, or None; None without a kernel.
        flops: of the arguments. Rows are bound by memory and count none.
        fused: the implementations that are registered.
        differentiable: how many arguments receive gradients: the first ones.
        rows: how many arguments are rows of activations: the first ones.
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
    triton: bool = True
    cuda: Callable[[Tensor], str | None] | None = None
    flops: Callable[..., float] = lambda *_: 0.0
    fused: dict[Impl, Fused] = field(default_factory=dict, init=False, compare=False, repr=False)
    differentiable: int = field(init=False)
    rows: int = field(init=False)
    _letters: list[list[str] | None] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        letters = [axes.split() if axes else None for axes in self.axes.values()]
        found = {
            "_letters": letters,
            "rows": sum(axes == ANY or len(axes or ()) > 2 for axes in letters),
            "differentiable": 0 if self.backward is None else results_of(self.backward.schema),
        }
        for name, value in found.items():
            object.__setattr__(self, name, value)

    def __call__(self, *arguments: Any, impl: Impl | None = None) -> Any:
        """Check the arguments of ``schema`` and compute the results by ``impl``.

        An operator without results writes its last argument, which is returned.
        """
        self.check(*arguments)
        results = self.run(impl, *arguments)
        return arguments[-1] if results is None else results

    def function(self, impl: Impl | None) -> Callable[..., Arguments]:
        """The op by ``impl``: from arguments to a tuple of the results that have gradients.

        Those of an op without a backward pass are all of its results.
        """
        kept = None if self.backward is None else self.backward.results
        return lambda *arguments: as_tuple(self(*arguments, impl=impl))[:kept]

    def run(self, impl: Impl | None, *arguments: Any) -> Any:
        """The results of arguments that are checked already."""
        x = arguments[0]
        if len(self.axes) > self.differentiable and torch.is_grad_enabled():
            impl = self._without_loss(impl, arguments)
        impl = choose(self, impl, x)
        if impl is Impl.REFERENCE or impl is Impl.ATEN:
            plain = self.reference if impl is Impl.REFERENCE else self.aten
            assert plain is not None
            with outside_autocast(x):
                return plain(*arguments)
        fused = self.fused[impl]
        if torch.compiler.is_compiling():
            return fused.operators["forward"](*arguments)
        return fused.apply(*arguments)

    def _without_loss(self, impl: Impl | None, arguments: Arguments) -> Impl | None:
        """``impl``, or for None the reference if a fused implementation would lose a gradient."""
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
        device = arguments[0].device
        for name, letters, x in zip(self.axes, self._letters, arguments, strict=False):
            if x is None or letters is None:
                continue
            if letters != ANY:
                shape = x.shape
                fits = len(shape) == len(letters)
                for letter, size in zip(letters, shape, strict=False):
                    fits = fits and sizes.setdefault(letter, size) == size
                if not fits:
                    check_shape(name, x, " ".join(letters), **sizes)
            if x.dtype not in DTYPES or x.device != device:
                check_tensors(**{next(iter(self.axes)): arguments[0], name: x})
        if self.require is not None:
            self.require(*arguments)

    @property
    def operators(self) -> list[Operator]:
        """What is registered for Triton."""
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
        """Gradients like what was saved; empty for what was absent or is not wanted."""
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
        """Flops, and the bytes of rows if each is read once and written once.

        Parameters are a few rows beside many and are left out. ``arguments`` may be of the device
        ``meta``: nothing is computed.
        """
        flops, results = self.flops(*arguments), as_tuple(self.fake(*arguments))
        if backward:
            assert self.backward is not None
            arguments = self.backward.arguments(results, arguments, results, parameters=True)
            results = as_tuple((self.backward.fake or self._backward_fake)(*arguments))
        tensors = [x for x in (*arguments, *results) if isinstance(x, Tensor)]
        return flops, sum(x.nbytes for x in tensors if x.dim() > 2)

    def calls(self, sizes: Sizes, impl: Impl = Impl.TRITON) -> Iterator[tuple[Operator, Arguments]]:
        """The operators of ``impl`` with arguments: specimens, and what follows from them."""
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
    """The results of an operator that returns none, one or several."""
    return results if isinstance(results, tuple) else () if results is None else (results,)


def results_of(schema: str) -> int:
    """The number of results in a schema."""
    return schema.rpartition(" -> ")[2].count("Tensor")
