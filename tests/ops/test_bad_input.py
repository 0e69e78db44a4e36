"""What does not fit is refused with what was expected, what came and what to do."""

import dataclasses
import pickle

import pytest
import torch

from blip3o_fast import ops
from blip3o_fast.ops import OPS, Impl, ImplTable, _dispatch, resolve_impl
from tests.kernels.oracle import randn
from tests.ops.cases import CASES, solver_update, update_inputs

BY_NAME = {case.name: case for case in CASES}
IMPLS = pytest.mark.parametrize("impl", [Impl.TRITON, Impl.REFERENCE], ids=lambda i: i.value)


def each_case(*names):
    cases = [BY_NAME[name] for name in names or BY_NAME]
    return pytest.mark.parametrize("case", cases, ids=lambda c: c.name)


@IMPLS
@each_case()
def test_dtype_that_is_not_floating(case, impl):
    values = case.inputs()
    values[0] = values[0].long()
    expected = "expected float16, bfloat16, float32 or float64, got torch.int64"
    with pytest.raises(ValueError, match=expected):
        case.call(*values, impl=impl)


@IMPLS
@each_case(*(case.name for case in CASES if len(case.inputs()) > 1))
def test_two_devices(case, impl):
    values = case.inputs()
    values[-1] = values[-1].to("meta")
    with pytest.raises(ValueError, match=r"expected device cpu, that of .*, got meta"):
        case.call(*values, impl=impl)


@IMPLS
@each_case("sandwich_norm", "sandwich_join", "adapter_mix", "flow_loss")
def test_batches_that_differ(case, impl):
    values = case.inputs()
    values[-1] = values[-1][:1]
    with pytest.raises(ValueError, match=r"expected shape \[.*B=2.*\], got \[1"):
        case.call(*values, impl=impl)


@IMPLS
@pytest.mark.parametrize(
    "name, position, shape, message",
    [
        (
            "swiglu",
            0,
            (2, 3, 7),
            r"gate_up: expected an even last axis \[..., 2I\], got \[2, 3, 7\]",
        ),
        ("swiglu", 0, (), r"gate_up: expected an even last axis"),
        ("rope", 0, (2, 48), r"qkv: expected shape \[B, N, W\], got \[2, 48\]"),
        ("rope", 2, (4, 12), r"sin: expected shape \[N=3, d=12\], got \[4, 12\]"),
        ("sandwich_norm", 0, (2, 6), r"x: expected shape \[B, N, D\], got \[2, 6\]"),
        ("sandwich_norm", 1, (7,), r"w1: expected shape \[D=6\], got \[7\]"),
        ("sandwich_norm", 3, (2, 3, 6), r"shift: expected shape \[B=2, D=6\], got \[2, 3, 6\]"),
        ("sandwich_join", 1, (2, 3, 7), r"y: expected shape \[B=2, N=3, D=6\], got \[2, 3, 7\]"),
        ("sandwich_join", 2, (2,), r"layer_scale: expected shape \[D=6\], got \[2\]"),
        ("sandwich_join", 5, (2, 7), r"post.shift: expected shape \[B=2, D=6\], got \[2, 7\]"),
        ("sandwich_join", 8, (7,), r"pre.w2: expected shape \[D=6\], got \[7\]"),
        ("adapter_norm", 0, (3, 8), r"x: expected shape \[B, N, P\], got \[3, 8\]"),
        ("adapter_norm", 2, (5,), r"bias: expected shape \[W=6\], got \[5\]"),
        (
            "adapter_mix",
            1,
            (2, 3, 7),
            r"adapted: expected shape \[B=2, N=3, D=6\], got \[2, 3, 7\]",
        ),
        ("flow_loss", 3, (2, 4, 6), r"noise: expected shape \[B=2, N=3, C=6\], got \[2, 4, 6\]"),
        ("flow_loss", 4, (2, 1), r"t: expected shape \[B=2\], got \[2, 1\]"),
    ],
)
def test_shapes_that_do_not_fit(name, position, shape, message, impl):
    values = BY_NAME[name].inputs()
    values[position] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        BY_NAME[name].call(*values, impl=impl)


@IMPLS
@pytest.mark.parametrize("width", [0, 9])
def test_adapter_weight_that_does_not_fit_the_row(impl, width):
    weight = torch.zeros(width)
    with pytest.raises(ValueError, match=f"weight: expected 1 to 8 entries.*got {width}"):
        ops.adapter_norm(torch.zeros(2, 3, 8), weight, weight, impl=impl)


@IMPLS
@pytest.mark.parametrize("shape", [(0, 3, 6), (2, 0, 6), (2, 3, 0)])
def test_loss_of_nothing(impl, shape):
    x = torch.zeros(shape)
    with pytest.raises(ValueError, match="velocity: expected at least one element"):
        BY_NAME["flow_loss"].call(x, x, x, x, torch.zeros(shape[0]), impl=impl)


def _int(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("impl", [*Impl][:3], ids=lambda i: i.value)
@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(3, 6)}, r"x: expected shape \[B, N, C\], got \[3, 6\]"),
        ({"x": torch.zeros(2, 3, 6).bfloat16()}, "x: expected float32 or float64, the state's"),
        ({"velocity": torch.zeros(4, 3, 6)}, r"velocity: expected shape \[B=2, N=3, C=6\]"),
        ({"velocity": torch.zeros(2, 3, 6).long()}, "velocity: expected float16, bfloat16, fl"),
        ({"guidance_scale": 2.0}, r"velocity: expected shape \[B=4, N=3, C=6\], got \[2, 3, 6\]"),
        ({"slopes": torch.zeros(2, 3, 6)}, r"slopes: expected shape \[R, B=2, N=3, C=6\]"),
        ({"slopes": torch.zeros(2, 1, 3, 6)}, r"slopes: expected shape \[R, B=2, N=3, C=6\]"),
        ({"slopes": torch.zeros(2, 2, 3, 6).double()}, "slopes: expected torch.float32, the dty"),
        ({"slopes": torch.zeros(2, 3, 2, 6).transpose(1, 2)}, "slopes: expected contiguous"),
        ({"coefficients": torch.zeros(3)}, r"coefficients: expected shape \[R \+ 2 = 4\].*\[3\]"),
        ({"coefficients": torch.zeros(4, 1)}, r"coefficients: expected shape.*got \[4, 1\]"),
        ({"coefficients": torch.zeros(4).double()}, "coefficients: expected torch.float32, the"),
        ({"coefficients": torch.zeros(4, device="meta")}, "coefficients: expected device cpu"),
        ({"slot": _int(0)}, r"slot: expected int64 of shape \[1\] on cpu, got torch.int32"),
        ({"slot": _int(0)[0].long()}, r"slot: expected int64 of shape \[1\].*of shape \[\]"),
        ({"slot": _int(0).long().to("meta")}, "slot: expected int64 .* on cpu, got .* on meta"),
        ({"out": torch.zeros(3, 3, 6)}, r"out: expected shape \[B=2, N=3, C=6\], got"),
        ({"out": torch.zeros(2, 3, 6).double()}, "out: expected torch.float32, the dtype of x"),
        ({"out": torch.zeros(2, 6, 3).mT}, "out: expected a contiguous tensor, got strides"),
        ({"clamp": torch.ones(())}, r"clamp: expected shape \[1\], got \[\]"),
        ({"clamp": torch.ones(1).double()}, "clamp: expected torch.float32, the dtype of x"),
        ({"clamp": torch.ones(1, device="meta")}, "clamp: expected device cpu, that of x"),
    ],
)
def test_solver_update(impl, change, message):
    arguments = dict(zip(("x", "velocity", "slopes", "coefficients"), update_inputs(), strict=True))
    before = arguments["slopes"].clone()
    with pytest.raises(ValueError, match=message), torch.no_grad():
        solver_update(**{**arguments, **change}, impl=impl)
    assert torch.equal(arguments["slopes"], before)


@pytest.mark.parametrize("position", range(4))
def test_solver_update_never_drops_a_gradient_silently(device, position):
    values = update_inputs(device=device)
    values[position].requires_grad_()
    values[2] = values[2].clone()
    for impl in (Impl.TRITON, Impl.ATEN):
        with pytest.raises(ValueError, match=r"no gradient|no backward.*torch.no_grad\(\)"):
            solver_update(*values, impl=impl)
    assert solver_update(*values, impl=None).requires_grad
    with torch.no_grad():
        assert not solver_update(*values, impl=Impl.TRITON).requires_grad


def test_flow_loss_never_drops_a_gradient_silently(device):
    velocity, x_t, x_1, noise, t = BY_NAME["flow_loss"].inputs(device=device)
    given = (velocity, x_t.requires_grad_(), x_1, noise, t)
    with pytest.raises(ValueError, match=r"x_t: expected no gradient to be needed.*flow_loss"):
        BY_NAME["flow_loss"].call(*given, impl=Impl.TRITON)
    (total,) = BY_NAME["flow_loss"].call(*given, impl=None)
    assert torch.autograd.grad(total, x_t)[0].any()


def test_tables_that_want_a_gradient_get_it_from_the_reference(device):
    """The fused rotation has a gradient in qkv alone."""
    qkv, cos, sin = BY_NAME["rope"].inputs(device=device)
    cos.requires_grad_()
    with pytest.raises(ValueError, match=r"cos: expected no gradient to be needed.*rope"):
        BY_NAME["rope"].call(qkv, cos, sin, impl=Impl.TRITON)
    turned, *_ = BY_NAME["rope"].call(qkv, cos, sin, impl=None)
    assert torch.autograd.grad(turned.sum(), cos)[0].any()


def test_rope_in_place_refuses_to_lose_a_gradient():
    qkv, cos, sin = BY_NAME["rope"].inputs()
    with pytest.raises(ValueError, match=r"inplace: expected torch.no_grad\(\)"):
        ops.rope(qkv.requires_grad_(), cos, sin, num_heads=2, num_kv_heads=1, inplace=True)


@IMPLS
@pytest.mark.parametrize(
    "width, d, message",
    [
        (48, 5, "cos: expected an even head width d, got 5"),
        (47, 12, r"qkv: expected shape \[B, N=3, W=48\], got \[2, 3, 47\]"),
    ],
)
def test_rope_of_heads_that_do_not_fit(impl, width, d, message):
    qkv, table = torch.zeros(2, 3, width), torch.zeros(3, d)
    with pytest.raises(ValueError, match=message):
        ops.rope(qkv, table, table, num_heads=2, num_kv_heads=1, impl=impl)


@pytest.mark.parametrize("heads, kv_heads", [(0, 0), (-1, 2)])
def test_rope_without_heads(heads, kv_heads):
    with pytest.raises(ValueError, match="num_heads, num_kv_heads: expected heads"):
        ops.rope(
            torch.zeros(2, 3, 0),
            torch.zeros(3, 4),
            torch.zeros(3, 4),
            num_heads=heads,
            num_kv_heads=kv_heads,
        )


@each_case("sandwich_norm", "sandwich_join", "adapter_norm", "flow_loss")
def test_rows_wider_than_one_program(device, case):
    with pytest.raises(ValueError, match=r"expected a width from 1 to 8192.*pass impl=Impl.REF"):
        case.call(*case.inputs(1, 1, 9000, device=device), impl=Impl.TRITON)


@each_case()
def test_triton_without_a_gpu_or_the_interpreter(case, monkeypatch):
    monkeypatch.setattr(_dispatch, "interpreting", lambda: False)
    message = r"impl=TRITON on a torch.float32 tensor of width \d+ on cpu.*TRITON_INTERPRET=1"
    with pytest.raises(ValueError, match=message):
        case.call(*case.inputs(), impl=Impl.TRITON)
    assert all(map(torch.is_tensor, case.call(*case.inputs(), impl=None)))


@each_case()
def test_triton_that_is_not_installed(case, monkeypatch):
    monkeypatch.setattr(_dispatch, "_TRITON_INSTALLED", False)
    with pytest.raises(ValueError, match=r"Triton is not installed.*\[triton\]"):
        case.call(*case.inputs(), impl=Impl.TRITON)


@each_case()
def test_cuda_kernels_on_a_cpu(case):
    with pytest.raises(ValueError, match="impl=CUDA"):
        case.call(*case.inputs(), impl=Impl.CUDA)


@each_case()
def test_name_instead_of_an_impl(case):
    with pytest.raises(ValueError, match="impl: expected an Impl or None, got 'triton'"):
        case.call(*case.inputs(), impl="triton")


def test_table_of_implementations():
    table = ImplTable()
    table.set(Impl.TRITON, rope=Impl.REFERENCE)
    assert table.rope is Impl.REFERENCE and table.swiglu is Impl.TRITON
    assert table.gemm_swiglu is table.rope_attention is Impl.REFERENCE  # those that they combine
    table.set(Impl.TRITON, gemm_swiglu=Impl.TRITON)
    assert table.gemm_swiglu is Impl.TRITON
    with pytest.raises(ValueError, match=r"unknown op 'norm'; expected one of .*, sandwich_norm, "):
        table.set(norm=Impl.TRITON)
    assert table.swiglu is Impl.TRITON
    assert [field.name for field in dataclasses.fields(table)] == list(OPS)
    assert ImplTable(*dataclasses.astuple(table)) == table == pickle.loads(pickle.dumps(table))


@pytest.mark.parametrize("op", OPS)
def test_automatic_choice_on_a_cpu_is_the_reference(op):
    assert resolve_impl(None, randn(2, 3, 6), op=op) is Impl.REFERENCE
