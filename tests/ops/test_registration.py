"""The registered operators: schemas, fakes, whole graphs under the compiler."""

import pytest
import torch

from blip3o_fast import ops
from blip3o_fast.ops import OPS, Sizes
from tests.kernels.oracle import laid_out
from tests.ops.cases import ALL_CASES, CASES, Case, label, outputs, solver_update, update_inputs

TRITON = ops.Impl.TRITON
NAMESPACE = torch.ops.blip3o_fast
FUSED = [op for op in OPS.values() if op.triton]


def test_every_operator_belongs_to_a_record():
    registered = {
        name.partition("::")[2].partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("blip3o_fast::")
    }
    called = {operator.name for op in FUSED for operator, _ in op.calls(Sizes())}
    assert registered == called == {operator.name for op in FUSED for operator in op.operators}


def small_sizes(op, device):
    """In fp32, or in bf16 if the kernel takes 16 bits alone."""
    for dtype in (torch.float32, torch.bfloat16):
        reason = op.triton(torch.empty(0, dtype=dtype, device=device))
        if reason is None:
            return Sizes(dtype=dtype, device=device)
    pytest.skip(reason)


@pytest.mark.parametrize("op", FUSED, ids=lambda op: op.name)
def test_opcheck(device, op):
    """Schema (no undeclared writes or aliases), fake tensors, tracing with symbolic shapes."""
    for operator, arguments in op.calls(small_sizes(op, device)):
        torch.library.opcheck(getattr(NAMESPACE, operator.name), arguments)


@pytest.mark.parametrize("op", FUSED, ids=lambda op: op.name)
def test_opcheck_where_a_gradient_is_recorded(device, op):
    """Strided rows too."""
    for first, *others in op.specimens(small_sizes(op, device)):
        arguments = (laid_out(first, "spread"), *others)
        for x in arguments[: op.differentiable]:
            if x is not None:
                x.requires_grad_()
        torch.library.opcheck(getattr(NAMESPACE, op.name), arguments)


TRACED = [
    pytest.param(case, dynamic, marks=() if quick else pytest.mark.slow)
    for case in ALL_CASES
    for dynamic in (False, True)
    for quick in [dynamic and (case.specimen < 2 or case.name != "sandwich_join")]
]
"""Every case with shapes that the compiler knows and with symbols; the quick tests have a part."""


@pytest.mark.parametrize(
    ("case", "dynamic"), TRACED, ids=lambda x: label(x) if isinstance(x, Case) else f"dynamic={x}"
)
def test_one_graph_forward_and_backward(device, case, dynamic):
    def step(*tensors):
        return sum(u.square().sum() for u in outputs(case.call(*tensors, impl=TRITON)))

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (3, 5):
        leaves = case.leaves(tokens=tokens, device=device)
        wanted = leaves[: case.differentiable]
        eager, traced = step(*leaves), compiled(*leaves)
        torch.testing.assert_close(traced, eager)
        torch.testing.assert_close(
            torch.autograd.grad(traced, wanted), torch.autograd.grad(eager, wanted)
        )


@pytest.mark.parametrize("into", ["a new tensor", "given memory", "the state"])
def test_one_graph_of_the_solver_update(device, into):
    torch._dynamo.reset()
    compiled = torch.compile(solver_update, fullgraph=True, backend="aot_eager")
    for rows in (0, 2):
        results = []
        for update in (solver_update, compiled):
            x, velocity, slopes, coefficients = update_inputs(rows=rows, device=device)
            out = {"a new tensor": None, "given memory": torch.empty_like(x), "the state": x}[into]
            got = update(x, velocity, slopes, coefficients, impl=TRITON, out=out)
            assert out is None or torch.equal(out, got)
            results.append((got, slopes))
        (expected, kept), (got, slopes) = results
        assert torch.equal(got, expected) and torch.equal(slopes, kept)


def test_the_reference_of_the_solver_update_compiles(device):
    torch._dynamo.reset()
    compiled = torch.compile(solver_update, fullgraph=True, backend="aot_eager")
    values = update_inputs(device=device)
    mine = [x.clone() for x in values]
    got = compiled(*values, impl=ops.Impl.REFERENCE)
    assert torch.equal(got, solver_update(*mine, impl=ops.Impl.REFERENCE))
    assert torch.equal(values[2], mine[2])


@pytest.mark.parametrize("case", CASES, ids=label)
def test_gradients_are_differentiable_once(device, case):
    leaves = case.leaves(device=device)
    total = sum(u.square().sum() for u in outputs(case.call(*leaves, impl=TRITON)))
    (first,) = torch.autograd.grad(total, leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()
