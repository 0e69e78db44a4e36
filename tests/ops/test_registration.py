"""The registered operators: schemas, fakes, whole graphs under the compiler."""

import pytest
import torch

from blip3o_fast import ops
from tests.kernels.oracle import randn
from tests.ops.cases import CASES, outputs, solver_update, update_inputs

TRITON = ops.Impl.TRITON
NAMESPACE = torch.ops.blip3o_fast


def specimens(device):
    """Arguments of every registered operator; strided where a model strides."""

    def r(*shape, seed=0):
        return randn(*shape, device=device, seed=seed)

    x, y, w = r(2, 3, 8), r(2, 3, 8, seed=1), r(8)
    shift, scale = r(2, 16).chunk(2, dim=-1)
    norm = (w, w + 1, shift, scale)
    qkv, table = r(2, 3, 20).transpose(0, 1).contiguous().transpose(0, 1), r(3, 4)
    t, slot = torch.tensor([0.25, 0.75], device=device), torch.tensor([1], device=device)
    path = (x, y, r(2, 3, 8, seed=2), r(2, 3, 8, seed=3), t)
    total, _, image, factors = NAMESPACE.flow_loss(*path, [1.0, 0.5, 0.2, 0.3], False, True)
    return {
        "swiglu": [(x,), (r(2, 3, 16)[..., ::2],)],
        "swiglu_backward": [(r(2, 3, 4), x)],
        "rope": [(qkv, table, table, 3)],
        "rope_": [(qkv.clone(), table, table, 3)],
        "rope_backward": [(qkv, table, table, 3)],
        "sandwich_norm": [(x, *norm, 1e-6)],
        "sandwich_norm_backward": [(y, x, *norm, 1e-6, flag) for flag in (False, True)],
        "sandwich_join": [
            (x, y, w, *norm, *norm, 1e-6),
            (x, y, None, *[None] * 4, *norm, 1e-6),
            (x, y, w, *norm, *[None] * 4, 1e-6),
        ],
        "sandwich_join_backward": [
            (y, y, x, y, w, *norm, *norm, 1e-6, True),
            (y, None, x, y, w, *norm, *[None] * 4, 1e-6, False),
            (None, y, x, y, None, *[None] * 4, *norm, 1e-6, True),
        ],
        "sandwich_norm_quantised": [(x, *norm, 1e-6)],
        "sandwich_join_quantised": [
            (x, y, w, *norm, *norm, 1e-6),
            (x, y, None, *[None] * 4, *norm, 1e-6),
        ],
        "swiglu_quantised": [(x,), (r(2, 3, 16)[..., ::2],)],
        "adapter_norm": [(x, w[:5].contiguous(), w[:5].contiguous(), 1e-5)],
        "adapter_norm_backward": [(y, x, w[:5].clone(), w[:5].clone(), 1e-5, f) for f in (0, 1)],
        "adapter_mix": [(x, y, x + y)],
        "adapter_mix_backward": [(y, x, y, x + y)],
        "solver_update": [
            (x, y, r(0, 2, 3, 8), r(2), None, None, 1.0, y.clone()),
            (x, torch.cat((x, y)), r(2, 2, 3, 8), r(4), slot, r(1).abs(), 2.0, y.clone()),
        ],
        "flow_loss": [(*path, [1.0, 0.5, 0.2, 0.3], flag, flag) for flag in (False, True)],
        "flow_loss_backward": [(total, *path, image, factors, False, True)],
    }


NAMES = (
    *("swiglu", "swiglu_backward", "rope", "rope_", "rope_backward"),
    *("sandwich_norm", "sandwich_norm_backward", "sandwich_join", "sandwich_join_backward"),
    *("sandwich_norm_quantised", "sandwich_join_quantised", "swiglu_quantised"),
    *("adapter_norm", "adapter_norm_backward", "adapter_mix", "adapter_mix_backward"),
    *("solver_update", "flow_loss", "flow_loss_backward"),
)


def test_every_operator_has_a_specimen():
    registered = {
        name.partition("::")[2].partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("blip3o_fast::")
    }
    assert registered == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(device, name):
    """Schema (no undeclared writes or aliases), fake tensors, tracing with symbolic shapes."""
    for arguments in specimens(device)[name]:
        torch.library.opcheck(getattr(NAMESPACE, name), arguments)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
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


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_gradients_are_differentiable_once(device, case):
    leaves = case.leaves(device=device)
    total = sum(u.square().sum() for u in outputs(case.call(*leaves, impl=TRITON)))
    (first,) = torch.autograd.grad(total, leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()
