"""Attention on every backend that can run here, and the choice among all of them."""

import sys
import threading
import types
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from blip3o_fast import ops, reference
from blip3o_fast.ops import AttentionBackend
from blip3o_fast.ops import _attention_backends as backends
from tests.kernels.oracle import check, laid_out, randn

HERE = [AttentionBackend.SDPA, AttentionBackend.REFERENCE]
PACKAGES = list(backends.PACKAGES)
FLAGS = ("flash", "mem_efficient", "math", "cudnn")


def inputs(batch=2, tokens=5, keys=7, heads=4, kv_heads=2, width=16, **options):
    return [
        randn(batch, tokens, heads, width, **options),
        randn(batch, keys, kv_heads, width, seed=1, **options),
        randn(batch, keys, kv_heads, width, seed=2, **options),
    ]


@pytest.fixture
def h100(monkeypatch):
    """The choice on an H100, of packages that no other test has installed."""
    monkeypatch.setattr(backends, "_compute_major", lambda device: 9)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    backends.package_function.cache_clear()
    yield
    backends.package_function.cache_clear()


def install(monkeypatch, module, function):
    """A stand-in for a package, found like an installed one."""
    for name in {module, module.partition(".")[0]}:
        stub = types.ModuleType(name)
        stub.__spec__ = types.SimpleNamespace(name=name)  # find_spec reads it
        monkeypatch.setitem(sys.modules, name, stub)
    if function is not None:
        sys.modules[module].flash_attn_func = function


def choose(
    width=64,
    tokens=5,
    dtype=torch.bfloat16,
    device="cuda",
    dropout=0.0,
    keys=None,
    heads=(4, 2),
    training=False,
):
    """Backend, and what speaks against those before it, for tensors without values."""
    with FakeTensorMode():
        q, k = (
            torch.empty(2, rows, n, width, dtype=dtype, device=device, requires_grad=training)
            for rows, n in zip((tokens, tokens if keys is None else keys), heads, strict=True)
        )
        chosen, passed = backends.choose(None, q, k, k, dropout)
    return chosen, "; ".join(passed)


@pytest.mark.parametrize("backend", [None, *HERE], ids=str)
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2), (3, 1)])
def test_against_the_specification(device, backend, heads, kv_heads):
    check(
        lambda q, k, v: ops.attention(q, k, v, backend=backend),
        reference.attention,
        inputs(heads=heads, kv_heads=kv_heads, device=device),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens, keys", [(1, 9), (63, 255), (257, 257)])
def test_half(device, dtype, tokens, keys):
    check(ops.attention, reference.attention, inputs(1, tokens, keys, dtype=dtype, device=device))


def test_packed_projection_is_read_where_it_lies(device):
    """Strided views of one projection, as the model passes them."""
    qkv = randn(2, 5, (4 + 2 + 2) * 16, device=device)
    q, k, v = qkv.unflatten(-1, (8, 16)).split((4, 2, 2), dim=2)
    check(ops.attention, reference.attention, [q, k, v])


def test_rows_that_are_not_contiguous(device):
    values = [laid_out(x, "spread") for x in inputs(device=device)]
    check(ops.attention, reference.attention, values)


@pytest.mark.parametrize("batch, tokens, keys", [(0, 5, 7), (2, 0, 7), (2, 5, 0)])
def test_empty(device, batch, tokens, keys):
    values = inputs(batch, tokens, keys, device=device)
    out = ops.attention(*(x.requires_grad_() for x in values))
    assert out.shape == values[0].shape and not out.any()
    out.sum().backward()


def test_no_repeated_keys(monkeypatch):
    """The grouped heads reach the kernel as they are."""
    seen = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, **options):
        seen.append((q.shape[1], k.shape[1], v.shape[1], k.data_ptr(), options["enable_gqa"]))
        return plain(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    q, k, v = inputs()
    ops.attention(q, k, v)
    assert seen == [(4, 2, 2, k.data_ptr(), True)]


def test_dropout_drops(device):
    q, k, v = inputs(2, 64, 64, device=device)
    torch.manual_seed(0)
    dropped = ops.attention(q, k, torch.ones_like(v), dropout=0.5)
    assert dropped.std() > 0.05 and abs(dropped.mean() - 1) < 0.05


def test_one_graph(device):
    torch._dynamo.reset()
    q, k, v = inputs(device=device)
    compiled = torch.compile(ops.attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), reference.attention(q, k, v))


def test_the_backend_is_queryable():
    absent = "not flash_attn_3, flash_attn_4, flash_attn_2: it needs CUDA tensors, got cpu"
    backend, reason = ops.attention_backend(*inputs())
    assert backend is AttentionBackend.SDPA
    assert reason == f"{absent}; torch would use FLASH_ATTENTION"
    _, reason = ops.attention_backend(*inputs(), dropout=0.1)
    assert reason == f"{absent}; torch would use MATH"
    asked = ops.attention_backend(*inputs(), backend=AttentionBackend.REFERENCE)
    assert asked == (AttentionBackend.REFERENCE, "asked for")


@pytest.mark.parametrize(
    "backend, message",
    [
        (AttentionBackend.FLASH_ATTN_2, "needs CUDA tensors, got cpu; pass backend=None"),
        (AttentionBackend.FLASH_ATTN_3, "needs CUDA tensors"),
        (AttentionBackend.FLASH_ATTN_4, "needs CUDA tensors"),
        (AttentionBackend.CUDNN, "needs CUDA tensors"),
        (AttentionBackend.FLASH, "needs CUDA tensors"),
    ],
)
def test_a_backend_that_cannot_run(backend, message):
    with pytest.raises(ValueError, match=rf"backend={backend.name} on torch.float32.*{message}"):
        ops.attention(*inputs(), backend=backend)


def test_dropout_is_never_ignored():
    with pytest.raises(ValueError, match="has no dropout"):
        ops.attention(*inputs(), dropout=0.5, backend=AttentionBackend.REFERENCE)


def flags():
    return [getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in FLAGS]


def test_the_flags_of_the_process_are_left_alone(monkeypatch):
    """torch keeps which kernels it may use in flags that all threads share."""
    written = []
    for name in FLAGS:
        monkeypatch.setattr(torch._C, f"_set_sdp_use_{name}", lambda on: written.append(on))
    torch.backends.cuda.enable_math_sdp(True)
    assert written == [True], "the setters are no longer those that torch calls"
    for backend in (None, *HERE):
        ops.attention(*inputs(), backend=backend)
    ops.attention(*inputs(), dropout=0.5)
    assert written == [True]


def test_threads_do_not_disturb_each_other():
    """Two threads attend while a third draws dropout, for which the CPU's flash has no code."""
    before, values, failures = flags(), inputs(), []
    expected = ops.attention(*values)
    start = threading.Barrier(3)

    def guarded(work):
        try:
            start.wait()
            for _ in range(300):
                work()
        except Exception as error:
            failures.append(error)

    def attend():
        assert torch.equal(ops.attention(*values), expected)

    def drop():
        x = values[0].transpose(1, 2)
        torch.nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5)
        assert flags() == before

    threads = [threading.Thread(target=guarded, args=(work,)) for work in (attend, attend, drop)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and flags() == before


def test_kernels_that_the_caller_allows():
    """Of torch's kernels ``MATH`` alone can be differentiated twice."""
    values = [x.double().requires_grad_() for x in inputs(1, 2, 3, width=4)]
    with sdpa_kernel(SDPBackend.MATH):
        assert ops.attention_backend(*values)[1].endswith("torch would use MATH")
        assert torch.autograd.gradgradcheck(ops.attention, values)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_traced():
    values = inputs()
    traced = torch.jit.trace(lambda *x: backends.run(AttentionBackend.SDPA, *x, 0.0), values)
    assert torch.equal(traced(*values), ops.attention(*values))


def test_order_on_an_h100(h100, monkeypatch):
    """cuDNN, which shares keys in both directions, stands before flash-attention 2."""
    for training in (False, True):
        backend, reason = choose(training=training)
        assert backend is AttentionBackend.CUDNN and "flash_attn_3 is not installed" in reason
    install(monkeypatch, "flash_attn", reference.attention)
    backends.package_function.cache_clear()
    assert choose()[0] is AttentionBackend.CUDNN
    install(monkeypatch, "flash_attn_interface", reference.attention)
    backends.package_function.cache_clear()
    assert choose() == (AttentionBackend.FLASH_ATTN_3, "")


def test_every_row_of_the_table_says_what_it_rests_on():
    results = Path(__file__).parents[2] / "benchmarks" / "results"
    generations = {major for major, _ in backends.ORDERS}
    assert set(backends.ORDERS) == {(major, way) for major in generations for way in (False, True)}
    for order in backends.ORDERS.values():
        assert order.why and (not order.measured or (results / order.measured).is_file())
        # Else SDPA would choose cuDNN where it was refused.
        assert order.backends.index(AttentionBackend.CUDNN) < order.backends.index(
            AttentionBackend.FLASH
        )


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"version": 91500}, "needs cuDNN 91501 or newer, got 91500"),
        ({"version": None}, "got 0"),
        ({"width": 192}, "heads of up to 128, got 192"),
        ({"keys": 1}, "at least two keys"),
        ({"keys": 576, "training": True}, "may be NaN"),
        ({"tokens": 1, "keys": 256, "training": True}, "may be NaN"),
        ({"training": True, "deterministic": True}, "differ from run to run"),
        ({"major": 10}, "may be wrong with fewer than 8 heads of keys"),
        ({"off": True}, "cuDNN attention is switched off"),
    ],
    ids=str,
)
def test_where_cudnn_is_not_trusted(h100, monkeypatch, changes, why):
    changes = dict(changes)
    version, major = changes.pop("version", 91900), changes.pop("major", 9)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    monkeypatch.setattr(backends, "_compute_major", lambda device: major)
    repeats = changes.pop("deterministic", False)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: repeats)
    on = not changes.pop("off", False)
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: on)
    backend, reason = choose(**changes)
    assert backend is AttentionBackend.FLASH and why in reason


def test_where_cudnn_is_trusted(h100, monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    for tokens in (256, 257, 576):
        assert choose(tokens=tokens)[0] is AttentionBackend.CUDNN
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    assert choose(tokens=257, training=True)[0] is AttentionBackend.CUDNN
    monkeypatch.setattr(backends, "_compute_major", lambda device: 10)
    assert choose(heads=(32, 8))[0] is AttentionBackend.CUDNN


@pytest.mark.parametrize("backend", [AttentionBackend.CUDNN, AttentionBackend.FLASH], ids=str)
def test_torchs_kernels_are_given_grouped_heads(monkeypatch, backend):
    """The operators of torch, stood in for by what they compute."""
    seen = []

    def operator(q, k, v, *options):
        seen.append((k.shape[1], *options))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True), None

    for name in ("cudnn", "flash"):
        monkeypatch.setattr(torch.ops.aten, f"_scaled_dot_product_{name}_attention", operator)
    q, k, v = inputs()
    out = backends.run(backend, q, k, v, 0.0)
    torch.testing.assert_close(out, reference.attention(q, k, v))
    backends.run(backend, q.requires_grad_(), k, v, 0.0)
    cudnn = backend is AttentionBackend.CUDNN
    assert seen == ([(2, None, False), (2, None, True)] if cudnn else [(2,), (2,)])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [AttentionBackend.CUDNN, AttentionBackend.FLASH], ids=str)
@pytest.mark.parametrize("tokens, keys", [(256, 256), (257, 257), (63, 255)])
def test_torchs_kernels_on_a_gpu(backend, tokens, keys):
    values = inputs(2, tokens, keys, 12, 4, 64, dtype=torch.bfloat16, device="cuda")
    try:
        ops.attention_backend(*values, backend=backend)
    except ValueError as error:
        pytest.skip(str(error))
    check(lambda *x: ops.attention(*x, backend=backend), reference.attention, values)


def test_on_a_gpu_of_another_maker(h100, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert choose()[0] is AttentionBackend.SDPA


def test_the_order_is_said(h100):
    with FakeTensorMode():
        q, k = (torch.empty(2, 5, n, 64, dtype=torch.half, device="cuda") for n in (4, 2))
        assert "the order is not measured: others saw" in ops.attention_backend(q, k, k)[1]
        q.requires_grad_()
        assert "not measured: flash 2 expands dk and dv" in ops.attention_backend(q, k, k)[1]


@pytest.mark.parametrize(
    "changes, chosen, why",
    [
        ({"dtype": torch.float32}, "SDPA", "float16 and bfloat16, got torch.float32"),
        ({"width": 512}, "SDPA", "multiple of 8 up to 256, got 512"),
        ({"width": 60}, "SDPA", "multiple of 8 up to 256, got 60"),
        ({"tokens": 0}, "SDPA", "at least one query and one key"),
        ({"dropout": 0.1}, "FLASH_ATTN_2", "flash_attn_3 has no dropout"),
        ({"device": "meta"}, "SDPA", "got meta"),
    ],
    ids=str,
)
def test_what_decides(h100, monkeypatch, changes, chosen, why):
    install(monkeypatch, "flash_attn", reference.attention)
    install(monkeypatch, "flash_attn_interface", reference.attention)
    backend, reason = choose(**changes)
    assert backend is AttentionBackend[chosen] and why in reason


def test_a_compiler_sees_torchs_own_kernels(h100, monkeypatch):
    install(monkeypatch, "flash_attn_interface", reference.attention)
    assert choose()[0] is AttentionBackend.FLASH_ATTN_3
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    backend, reason = choose()
    assert backend is AttentionBackend.SDPA and "torch.compile is tracing" in reason


def test_a_caller_may_switch_flash_attention_off(h100, monkeypatch):
    install(monkeypatch, "flash_attn_interface", reference.attention)
    with sdpa_kernel(SDPBackend.MATH):
        backend, reason = choose()
    assert backend is AttentionBackend.SDPA and "switched off" in reason
    assert choose()[0] is AttentionBackend.FLASH_ATTN_3


def test_a_last_axis_that_is_not_contiguous(h100, monkeypatch):
    install(monkeypatch, "flash_attn_interface", reference.attention)
    with FakeTensorMode():
        q, k = (torch.empty(2, 5, n, 64, dtype=torch.half, device="cuda") for n in (4, 2))
        spread = torch.empty_strided(k.shape, (1280, 256, 128, 2), dtype=k.dtype, device="cuda")
        assert backends.choose(None, q, k, k, 0.0)[0] is AttentionBackend.FLASH_ATTN_3
        chosen, passed = backends.choose(None, q, k, spread, 0.0)
    assert chosen is AttentionBackend.SDPA and "last axis" in next(iter(passed))


def test_old_gpu(h100, monkeypatch):
    monkeypatch.setattr(backends, "_compute_major", lambda device: 7)
    backend, reason = choose()
    assert backend is AttentionBackend.SDPA and "capability 9 to 9, got 7" in reason


def test_a_package_that_does_not_load(h100, monkeypatch):
    """flash-attn-4 alone leaves a flash_attn folder without the function of flash-attn."""
    install(monkeypatch, "flash_attn", None)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: None)
    backend, reason = choose()
    assert backend is AttentionBackend.FLASH
    assert "flash-attn is not installed or does not load" in reason


@pytest.mark.parametrize("backend", PACKAGES, ids=str)
@pytest.mark.parametrize("with_logsumexp", [False, True])
def test_packages_are_called_in_their_own_layout(h100, monkeypatch, backend, with_logsumexp):
    def function(q, k, v, **options):
        assert options == ({"dropout_p": 0.0} if backend is AttentionBackend.FLASH_ATTN_2 else {})
        out = reference.attention(q, k, v)
        return (out, None) if with_logsumexp else out

    install(monkeypatch, backends.PACKAGES[backend].module, function)
    values = inputs()
    assert torch.equal(backends.run(backend, *values, 0.0), reference.attention(*values))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda q, k, v: (q[0], k, v), r"q: expected shape \[B, N, H, d\]"),
        (lambda q, k, v: (q, k[:1], v), r"k: expected shape \[B=2, M, K, d=16\]"),
        (lambda q, k, v: (q, k, v[:, :3]), r"v: expected shape \[B=2, M=7, K=2, d=16\]"),
        (
            lambda q, k, v: (q[:, :, :3], k, v),
            "k: expected a number of heads that divides 3, got 2",
        ),
        (lambda q, k, v: (q, k[:, :, :0], v[:, :, :0]), "divides 4, got 0"),
        (lambda q, k, v: (q, k.half(), v), "k: expected torch.float32, the dtype of q"),
        (lambda q, k, v: (q.long(), k, v), "q: expected float16, bfloat16, float32 or float64"),
        (lambda q, k, v: (q, k.to("meta"), v), "k: expected device cpu, that of q, got meta"),
    ],
)
def test_bad_tensors(change, message):
    with pytest.raises(ValueError, match=message):
        ops.attention(*change(*inputs()))


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
def test_bad_dropout(dropout):
    with pytest.raises(ValueError, match="dropout: expected a probability below 1"):
        ops.attention(*inputs(), dropout=dropout)
