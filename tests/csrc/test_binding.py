"""``binding.cpp`` over kernels that run on the host.

``tests/kernels`` judges its numbers; here stand its schemas, its refusals and what only it does.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from blip3o_fast import ops, reference
from blip3o_fast.ops import _cuda
from tests.csrc.build import load_host_operators
from tests.kernels.oracle import check, laid_out, randn


@pytest.fixture(autouse=True)
def on_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """``impl=Impl.CUDA`` runs the emulated kernels on CPU tensors."""
    load_host_operators()
    monkeypatch.setattr(_cuda, "operators", lambda: torch.ops.blip3o_fast_host)
    monkeypatch.setattr(_cuda, "refusal", lambda op, x: "")


@pytest.mark.parametrize("name", _cuda.OPERATORS)
def test_schemas_are_those_of_the_library(name: str) -> None:
    """One fake and one autograd function serve both; only then may they."""
    ours = str(getattr(torch.ops.blip3o_fast_host, name).default._schema)
    theirs = str(getattr(torch.ops.blip3o_fast, name).default._schema)
    assert ours == theirs.replace("blip3o_fast::", "blip3o_fast_host::")


def test_fakes_agree_with_the_operators() -> None:
    """Shapes, dtypes and strides of every result, absent ones and unwanted gradients included."""
    x, y = (randn(2, 3, 8, dtype=torch.bfloat16, seed=i) for i in (0, 1))
    w, row = randn(8), randn(2, 8)
    site, none = (w, w, row, row), (None,) * 4
    tables = randn(3, 4), randn(3, 4)
    update = x.float(), y, randn(2, 2, 3, 8), randn(4)
    calls = [
        ("swiglu", x),
        ("swiglu_backward", x[..., :4], x),
        ("rope", x, *tables, 1),
        ("rope_backward", x, *tables, 1),
        ("sandwich_norm", x, *site, 1e-6),
        *(("sandwich_norm_backward", y, x, *site, 1e-6, wanted) for wanted in (True, False)),
        ("sandwich_join", x, y, w, *site, *site, 1e-6),
        ("sandwich_join", x, y, None, *none, *none, 1e-6),
        ("sandwich_join_backward", y, x, x, y, w, *site, *site, 1e-6, True),
        ("sandwich_join_backward", None, x, x, y, w, *none, *site, 1e-6, False),
        ("sandwich_join_backward", y, None, x, y, None, *none, *none, 1e-6, True),
        ("solver_update", *update, None, None, 1.0, x.float()),
    ]
    for name, *args in calls:
        real = getattr(torch.ops.blip3o_fast_host, name)(*args)
        mode = FakeTensorMode()
        with mode:
            given = [mode.from_tensor(u) if isinstance(u, torch.Tensor) else u for u in args]
            fake = getattr(torch.ops.blip3o_fast, name)(*given)
        pairs = zip(_as_tuple(real), _as_tuple(fake), strict=True)
        for got, promised in pairs:
            assert got.shape == promised.shape, name
            assert got.dtype == promised.dtype, name
            assert got.stride() == promised.stride(), name


def test_the_fake_of_rope_attention_agrees_with_it() -> None:
    q, k = (randn(2, 3, heads, 64, dtype=torch.bfloat16) for heads in (4, 2))
    tables = randn(3, 64), randn(3, 64)
    real = torch.ops.blip3o_fast_host.rope_attention(q, k, k, *tables, True)
    spread = laid_out(q, "spread")
    promised = _cuda.fake_rope_attention(spread, k, k, *tables, True)
    assert real.shape == promised.shape and real.stride() == promised.stride()
    assert real.dtype == promised.dtype


def _as_tuple(results):
    return (results,) if isinstance(results, torch.Tensor) else results or ()


def test_rope_in_place_on_rows_of_a_wider_tensor() -> None:
    qkv = laid_out(randn(2, 5, 16), "sliced")
    cos, sin = randn(5, 4, seed=1), randn(5, 4, seed=2)
    expected = reference.rope(qkv, cos, sin, 2, 1)
    margin = qkv._base[..., 0].clone()
    out = ops.rope(qkv, cos, sin, num_heads=2, num_kv_heads=1, impl=ops.Impl.CUDA, inplace=True)
    assert out is qkv
    torch.testing.assert_close(qkv, expected)
    torch.testing.assert_close(qkv._base[..., 0], margin, equal_nan=True)


@pytest.mark.parametrize("shift_dtype", [torch.bfloat16, torch.float64])
def test_parameters_of_several_dtypes(shift_dtype: torch.dtype) -> None:
    """Each gradient comes back in the dtype of its parameter."""

    def fused(*tensors):
        return ops.sandwich_norm(*tensors, eps=1e-6, impl=ops.Impl.CUDA)

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


def test_compiles_without_a_break() -> None:
    torch._dynamo.reset()
    gate_up = randn(2, 3, 16)
    for name in ("swiglu", "swiglu_backward"):
        fake = getattr(torch.ops.blip3o_fast, name)
        torch.library.register_fake(
            f"blip3o_fast_host::{name}", lambda *args, fake=fake: fake(*args), allow_override=True
        )

    def loss(x: torch.Tensor) -> torch.Tensor:
        return ops.swiglu(x, impl=ops.Impl.CUDA).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaves = [gate_up.clone().requires_grad_() for _ in range(2)]
    values = [f(x) for f, x in zip((loss, compiled), leaves, strict=True)]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(
        *(torch.autograd.grad(value, x) for value, x in zip(values, leaves, strict=True))
    )
