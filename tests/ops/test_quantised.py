"""The product of e4m3 rows, and what its ops refuse."""

from types import SimpleNamespace

import pytest
import torch

from blip3o_fast import ops
from blip3o_fast.ops import Impl, quantised
from tests.kernels.oracle import randn

EPS = 1e-6
NVIDIA = r"expected an NVIDIA GPU of compute capability 8.9 or at least 9.0, got "
REMEDY = r"pass impl=Impl.REFERENCE, which emulates it"


def rows(*shape, seed=0, device="cpu"):
    return ops.quantise_rows(randn(*shape, seed=seed, device=device))


def modulation(width=16):
    return ops.Modulation(*(torch.ones(width),) * 2, *(torch.zeros(2, width),) * 2)


QUANTISED = {
    "sandwich_norm": lambda x, **kw: ops.sandwich_norm_quantised(x, *modulation(), eps=EPS, **kw),
    "sandwich_join": lambda x, **kw: ops.sandwich_join_quantised(
        x, x, None, None, modulation(), eps=EPS, **kw
    )[1],
    "swiglu": lambda x, **kw: ops.swiglu_quantised(x, **kw),
}
every = pytest.mark.parametrize("name", QUANTISED)


@pytest.mark.parametrize("lead", [(5,), (2, 3), (0, 3)])
@pytest.mark.parametrize("width, out", [(48, 32), (7, 3)])
def test_emulated_product(lead, width, out):
    """To fp32 sums of the exact products of e4m3 numbers, rounded once to bf16."""
    x, w = rows(*lead, width), rows(out, width, seed=1)
    x64, w64 = (u.values.double() * u.scales.double() for u in (x, w))
    exact = x64 @ w64.T
    got = ops.scaled_linear(x, w, impl=Impl.REFERENCE)
    assert got.dtype == torch.bfloat16 and got.shape == (*lead, out)
    bound = exact.abs() * 2.0**-8 + (x64.abs() @ w64.abs().T) * (width + 2) * 2.0**-24
    assert ((got.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("lead", [(5,), (2, 3), (1, 1)])
def test_scaled_mm_is_called_as_it_wants(device, request, monkeypatch, lead):
    """Row-wise scales, second operand column-major; a CPU multiplies it too, in fp32."""
    if device.type == "cpu":
        request.getfixturevalue("cpu_scales_rows")
        monkeypatch.setattr(quantised, "e4m3_refusal", lambda device: None)
    x, w = rows(*lead, 48, device=device), rows(32, 48, seed=1, device=device)
    got = ops.scaled_linear(x, w)
    emulated = ops.scaled_linear(x, w, impl=Impl.REFERENCE)
    torch.testing.assert_close(got, emulated, rtol=2.0**-7, atol=1e-3)
    strided = ops.Quantised(*(u.t().contiguous().t() for u in w))
    assert torch.equal(ops.scaled_linear(x, strided), got)


def test_nothing_emulates_unasked():
    x, w = rows(4, 16), rows(16, 16)
    for impl in (None, Impl.TRITON, Impl.CUDA):
        with pytest.raises(ValueError, match=f"scaled_linear: {NVIDIA}cpu; {REMEDY}"):
            ops.scaled_linear(x, w, impl=impl)


@pytest.mark.parametrize(
    "capability, refused", [((8, 0), True), ((8, 6), True), ((8, 9), False), ((9, 0), False)]
)
def test_which_gpu_multiplies_e4m3(monkeypatch, capability, refused):
    found = SimpleNamespace(major=capability[0], minor=capability[1], name="GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    refusal = ops.e4m3_refusal(torch.device("cuda"))
    assert bool(refusal) == refused
    if refusal:
        assert refusal.startswith(NVIDIA) and "GPU of 8." in refusal


def test_amd_is_refused(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "got an AMD GPU" in (ops.e4m3_refusal(torch.device("cuda")) or "")


@pytest.mark.parametrize("width, out", [(24, 16), (16, 24)])
def test_widths_that_the_hardware_does_not_take(monkeypatch, width, out):
    monkeypatch.setattr(quantised, "e4m3_refusal", lambda device: None)
    with pytest.raises(ValueError, match=rf"weight: expected multiples of 16.*\[{out}, {width}\]"):
        ops.scaled_linear(rows(4, width), rows(out, width))


@pytest.mark.parametrize(
    "x, w, message",
    [
        (rows(4, 16), rows(8, 15), r"weight: expected shape \[out, K=16\], got \[8, 15\]"),
        (rows(4, 16)._replace(values=torch.ones(4, 16)), rows(8, 16), "x.values: expected torch.f"),
        (rows(4, 16), rows(8, 16)._replace(scales=torch.ones(8)), r"weight.scales: .*\[8, 1\]"),
        (rows(4, 16)._replace(scales=torch.ones(4, 1).half()), rows(8, 16), "x.scales: .*float16"),
    ],
)
def test_operands_that_do_not_fit(x, w, message):
    with pytest.raises(ValueError, match=message):
        ops.scaled_linear(x, w, impl=Impl.REFERENCE)


@every
@pytest.mark.parametrize("impl", [None, Impl.REFERENCE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_quantises_the_result_of_the_reference(name, impl, dtype):
    x = randn(2, 3, 16, dtype=dtype)
    plain = {
        "sandwich_norm": lambda: ops.sandwich_norm(x, *modulation(), eps=EPS, impl=Impl.REFERENCE),
        "sandwich_join": lambda: ops.sandwich_join(
            x, x, None, None, modulation(), eps=EPS, impl=Impl.REFERENCE
        )[1],
        "swiglu": lambda: ops.swiglu(x, impl=Impl.REFERENCE),
    }
    got, expected = QUANTISED[name](x, impl=impl), ops.quantise_rows(plain[name]())
    assert torch.equal(got.values.float(), expected.values.float())
    assert torch.equal(got.scales, expected.scales)


@every
def test_no_gradient_is_lost_silently(name):
    x = randn(2, 3, 16).requires_grad_()
    with pytest.raises(ValueError, match=rf"{name}_quantised records no gradient.*torch.no_grad"):
        QUANTISED[name](x)
    with torch.no_grad():
        QUANTISED[name](x)


@every
def test_what_has_no_such_kernel(name):
    x = randn(2, 3, 16)
    for impl in (Impl.CUDA, Impl.ATEN):
        with pytest.raises(ValueError, match=f"impl={impl.name}"):
            QUANTISED[name](x, impl=impl)


@every
def test_kernels_on_a_gpu_without_e4m3(name, monkeypatch):
    """Where the conversion does not exist the kernel is not even compiled."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(quantised, "e4m3_refusal", lambda device: "too old")
    with pytest.raises(ValueError, match=f"{name}_quantised: too old; {REMEDY}"):
        QUANTISED[name](randn(2, 3, 16), impl=Impl.TRITON)


@every
def test_autocast_changes_nothing(name):
    x = randn(2, 3, 16)
    plain = QUANTISED[name](x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = QUANTISED[name](x)
    assert torch.equal(plain.values.float(), cast.values.float())
    w = rows(8, plain.values.shape[-1])
    with torch.autocast("cpu", torch.bfloat16):
        product = ops.scaled_linear(plain, w, impl=Impl.REFERENCE)
    assert torch.equal(product, ops.scaled_linear(plain, w, impl=Impl.REFERENCE))
