"""``binding.cpp`` over kernels that run on the host.

``tests/kernels`` judges its numbers; here stand its schemas, its refusals and what only it does.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from blip3o_fast import ops, reference
from blip3o_fast.ops import OPS, Op, Sizes
from blip3o_fast.ops._record import as_tuple
from tests.csrc.build import emulate_cuda
from tests.kernels.oracle import check, laid_out, randn

CUDA = ops.Impl.CUDA
BOUND = [op for op in OPS.values() if op.cuda is not None]
every = pytest.mark.parametrize("op", BOUND, ids=lambda op: op.name)


@pytest.fixture(autouse=True)
def on_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """``impl=Impl.CUDA`` runs the emulated kernels on CPU tensors."""
    emulate_cuda(monkeypatch)


@every
def test_schemas_are_those_of_the_record(op: Op) -> None:
    """One fake and one autograd function serve both; only then may they."""
    for operator in op.operators:
        if operator.launcher == "forward_quantised":
            continue  # of Triton alone
        ours = getattr(torch.ops.blip3o_fast_host, operator.name).default._schema
        assert str(ours) == f"blip3o_fast_host::{operator.name}{operator.schema}"


@every
def test_fakes_agree_with_the_operators(op: Op) -> None:
    """Shapes, dtypes and strides of every result, absent ones and unwanted gradients included."""
    narrow = Sizes(dtype=torch.bfloat16, parameter_dtype=torch.float32)
    for operator, arguments in op.calls(narrow, CUDA):
        if operator.launcher not in op.fused[CUDA].operators:
            continue
        bound = op.fused[CUDA].operators[operator.launcher]
        real, mode = bound(*arguments), FakeTensorMode()
        with mode:
            given = [mode.from_tensor(u) if isinstance(u, torch.Tensor) else u for u in arguments]
            fake = bound(*given)
        for got, promised in zip(as_tuple(real), as_tuple(fake), strict=True):
            assert got.shape == promised.shape, operator.name
            assert got.dtype == promised.dtype, operator.name
            assert got.stride() == promised.stride(), operator.name


def test_rope_in_place_on_rows_of_a_wider_tensor() -> None:
    qkv = laid_out(randn(2, 5, 16), "sliced")
    cos, sin = randn(5, 4, seed=1), randn(5, 4, seed=2)
    expected = reference.rope(qkv, cos, sin, 2, 1)
    margin = qkv._base[..., 0].clone()
    out = ops.rope(qkv, cos, sin, num_heads=2, num_kv_heads=1, impl=CUDA, inplace=True)
    assert out is qkv
    torch.testing.assert_close(qkv, expected)
    torch.testing.assert_close(qkv._base[..., 0], margin, equal_nan=True)


@pytest.mark.parametrize("shift_dtype", [torch.bfloat16, torch.float64])
def test_parameters_of_several_dtypes(shift_dtype: torch.dtype) -> None:
    """Each gradient comes back in the dtype of its parameter."""

    def fused(*tensors):
        return ops.sandwich_norm(*tensors, eps=1e-6, impl=CUDA)

    def expected(*tensors):
        return reference.sandwich_norm(*tensors, 1e-6)

    x = randn(2, 3, 16, dtype=torch.bfloat16)
    w1, w2 = (randn(16, seed=i, scale=0.3, offset=1) for i in (1, 2))
    shift, scale = (randn(2, 16, dtype=shift_dtype, seed=i, scale=0.5) for i in (3, 4))
    tensors = [u.requires_grad_() for u in (x, w1, w2, shift, scale)]
    grads = torch.autograd.grad(fused(*tensors).sum(), tensors)
    assert [g.dtype for g in grads] == [u.dtype for u in tensors]
    check(fused, expected, (x, w1, w2, shift, scale), differentiable=(0, 1, 2))


def test_a_width_without_a_kernel_says_so() -> None:
    x, w, row = torch.ones(1, 1, 3080), torch.ones(3080), torch.ones(1, 3080)
    with pytest.raises(RuntimeError, match=r"at most 3072 wide.*impl=Impl\.TRITON"):
        torch.ops.blip3o_fast_host.sandwich_norm(x, w, w, row, row, 1e-6)


def test_float64_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"float16, bfloat16 or float32"):
        torch.ops.blip3o_fast_host.swiglu(torch.ones(1, 2, 8, dtype=torch.float64))


def test_a_state_of_another_dtype_says_so() -> None:
    x = randn(1, 2, 8)
    for position in (0, 2, 7):
        call = [x, x, x[None].clone(), randn(3), None, None, 1.0, x.clone()]
        call[position] = call[position].bfloat16()
        with pytest.raises(RuntimeError, match=r"float32 state.*impl=Impl\.TRITON"):
            torch.ops.blip3o_fast_host.solver_update(*call)


@every
def test_compiles_without_a_break(op: Op) -> None:
    """With the gradients of eager mode."""
    torch._dynamo.reset()
    arguments = op.specimens(Sizes(dtype=torch.bfloat16))[0]

    def run(*given: object) -> list[torch.Tensor]:
        results = as_tuple(op(*given, impl=CUDA))
        return [u.float().square().sum() for u in results if u.requires_grad] or list(results)

    outcomes = []
    for call in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        given = [u.clone() if isinstance(u, torch.Tensor) else u for u in arguments]
        leaves = [u.requires_grad_() for u in given[: op.differentiable]]
        results = call(*given)
        outcomes.append([*results, *(torch.autograd.grad(sum(results), leaves) if leaves else ())])
    for eager, compiled in zip(*outcomes, strict=True):
        torch.testing.assert_close(compiled, eager)
