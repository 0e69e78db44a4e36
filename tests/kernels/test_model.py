"""The whole model on the kernels: recorded outputs, gradients, training, padded widths."""

from dataclasses import replace

import pytest
import torch
from golden_data import MODELS, load_golden, relative_error
from rounding import rounding_bound, roundings_of
from torch.utils.checkpoint import checkpoint

from blip3o_fast import BLIP3oDiT, DiTConfig, RectifiedFlowLoss, ops
from blip3o_fast.flow import interpolate
from blip3o_fast.model import adapter
from tests.kernels.oracle import randn

TRITON, REFERENCE = ops.Impl.TRITON, ops.Impl.REFERENCE

SMALL = DiTConfig(
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=20,
    eva_embedding_size=21,
    clip_embedding_size=6,
    num_tokens=4,
    grid=(1, 2, 2),
    eva_adapter_layers=2,
    eva_adapter_dropout=0.0,
    conventions="consistent",
)
"""The adapter's width between 21 and 16 is 18: padded rows where widths are padded."""


def recorded(name, device):
    golden = load_golden(name)
    model = BLIP3oDiT(DiTConfig.from_dict(golden.config)).eval()
    model.load_state_dict(golden.weights)
    return model.to(device), {k: v.to(device) for k, v in golden.tensors.items()}


def small(device):
    torch.manual_seed(0)
    model = BLIP3oDiT(replace(SMALL, zero_init_output=False)).to(device)
    widths = {"x": 6, "velocity": 6, "noise": 6, "eva": 21}
    drawn = {k: randn(2, 4, w, device=device, seed=i) for i, (k, w) in enumerate(widths.items())}
    return model, {**drawn, "t": torch.tensor([0.2, 0.7], device=device)}


def gradients(model, tensors, impl):
    model.set_impl(impl)
    model.zero_grad()
    x, eva = (tensors[k].detach().requires_grad_() for k in ("x", "eva"))
    velocity = model(x, tensors["t"], eva, return_dict=False)
    loss = RectifiedFlowLoss(impl=impl)
    terms = loss(velocity, tensors["noise"], tensors["velocity"], tensors["noise"], tensors["t"])
    terms.total.backward()
    named = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    return {**named, "input": x.grad, "condition": eva.grad}


RECORDED = "sandwich_rope"


def interpreted(name):
    """The model, in the quick tests only if it is ``RECORDED``: it takes long to interpret one."""
    return pytest.param(name, marks=() if name == RECORDED else pytest.mark.slow)


@pytest.mark.parametrize("name", [interpreted(name) for name in MODELS])
def test_recorded_forward(device, name):
    model, tensors = recorded(name, device)
    model.set_impl(TRITON)
    with torch.no_grad():
        out = model(tensors["x"], tensors["t"], tensors["eva"])
    assert relative_error(out["velocity_prediction"], tensors["velocity"]) < 1e-5
    assert relative_error(out["hidden_states"], tensors["hidden"]) < 1e-5


@pytest.mark.parametrize(
    "name",
    ["small", *(pytest.param(x, marks=pytest.mark.slow) for x in (RECORDED, "prenorm_rope"))],
)
def test_gradients(device, name):
    """Every parameter and both inputs, against autograd through the reference in fp64."""
    model, tensors = small(device) if name == "small" else recorded(name, device)
    ours = gradients(model, tensors, TRITON)
    same = gradients(model, tensors, REFERENCE)
    truth = gradients(model.double(), {k: v.double() for k, v in tensors.items()}, REFERENCE)
    assert set(ours) == set(truth) and len(ours) > 40
    # Forward, and back through twice as many products.
    unit = rounding_bound(torch.float32, 3 * roundings_of(model.config))
    for key, expected in truth.items():
        error = (ours[key].double() - expected).norm()
        allowed = 2 * (same[key].double() - expected).norm() + unit * expected.norm()
        assert error <= allowed, f"{key}: {error:.2e}, allowed {allowed:.2e}"


def test_every_op_of_the_model_is_told_which_kernel(device, monkeypatch):
    """The reference of no row op runs anywhere in a training step on the kernels."""
    from blip3o_fast import reference

    of_sampling = {"solver_update", "rope_attention"}
    for name in set(ops.ImplTable.__dataclass_fields__) - of_sampling:
        monkeypatch.setattr(reference, name, lambda *a, name=name, **k: pytest.fail(name))
    train(TRITON, device, steps=1)


def train(impl, device, steps, dtype=torch.float32):
    torch.manual_seed(0)
    model = BLIP3oDiT(SMALL).to(device, dtype).train()
    model.set_impl(impl)
    loss = RectifiedFlowLoss(impl=impl)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        x_1, noise = (randn(4, 4, 6, device=device, dtype=dtype, seed=4 * step + i) for i in (0, 1))
        x_1 = x_1 + 2
        eva = randn(4, 4, 21, device=device, dtype=dtype, seed=4 * step + 2)
        t = torch.linspace(0.1, 0.9, 4, device=device, dtype=dtype)
        x_t = interpolate(x_1, noise, t)
        terms = loss(model(x_t, t, eva, return_dict=False), x_t, x_1, noise, t)
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
        losses.append(terms.total.item())
    return torch.tensor(losses)


@pytest.mark.slow
def test_fifty_training_steps(device):
    """fp32 curves differ by rounding alone: 1e-4 of the loss at every step, where it halves."""
    ours, expected = (train(impl, device, steps=50) for impl in (TRITON, REFERENCE))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=0.0)
    assert expected[-5:].mean() < 0.7 * expected[:5].mean()


@pytest.mark.parametrize("impl", [TRITON, REFERENCE], ids=lambda i: i.value)
def test_padded_widths_change_nothing_but_the_rows(device, monkeypatch, impl):
    """Outputs, gradients and the checkpoint's shapes are those of the published widths."""
    torch.manual_seed(0)
    model = adapter.EVAAdapter(SMALL, ops.ImplTable(adapter_norm=impl, adapter_mix=impl))
    model = model.to(device, torch.float64)
    shapes = {name: p.shape for name, p in model.state_dict().items()}
    assert (18,) in shapes.values()
    eva = randn(2, 4, 21, dtype=torch.float64, device=device)
    results = {}
    for multiple in (1, 8):
        monkeypatch.setattr(adapter, "width_multiple", lambda x, m=multiple: m)
        leaf = eva.clone().requires_grad_()
        out = model(leaf)
        wanted = [leaf, *model.parameters()]
        results[multiple] = [out, *torch.autograd.grad(out.square().sum(), wanted)]
    for a, b in zip(results[1], results[8], strict=True):
        assert relative_error(a, b) < rounding_bound(torch.float64, 3 * roundings_of(SMALL))
    assert {name: p.shape for name, p in model.state_dict().items()} == shapes


def test_widths_are_padded_where_gemms_want_it(monkeypatch):
    seen = []
    norm = ops.adapter_norm
    monkeypatch.setattr(adapter, "width_multiple", lambda x: 64)
    monkeypatch.setattr(ops, "adapter_norm", lambda x, *a, **k: seen.append(x) or norm(x, *a, **k))
    adapter.EVAAdapter(SMALL, ops.ImplTable())(torch.zeros(1, 2, 21))
    assert seen and all(x.shape[-1] == 64 and x.is_contiguous() for x in seen)


@pytest.mark.parametrize("impl", [TRITON, REFERENCE], ids=lambda i: i.value)
def test_the_generator_of_torch_decides_what_is_dropped(device, impl):
    """Also where the adapter runs again for its gradient."""
    torch.manual_seed(0)
    config = replace(SMALL, eva_adapter_layers=1, eva_adapter_dropout=0.3)
    model = adapter.EVAAdapter(config, ops.ImplTable(adapter_norm=impl, adapter_mix=impl))
    model, eva = model.to(device), randn(2, 4, 21, device=device)
    runs = {
        "plain": lambda: model(eva),
        "checkpointed": lambda: checkpoint(model, eva, use_reentrant=False),
        "later": lambda: (torch.rand(1, device=device), model(eva))[1],
    }
    found = {}
    for name, run in runs.items():
        torch.manual_seed(1)
        out = run()
        found[name] = [out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))]
    for a, b in zip(found["plain"], found["checkpointed"], strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.allclose(found["plain"][0], found["later"][0], rtol=1e-3)
    state = torch.get_rng_state()
    assert torch.equal(model.eval()(eva), model(eva))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_compiles_with_dynamic_shapes(device):
    """One join reads what another wrote, under shapes that the compiler knows by symbols alone."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = BLIP3oDiT(replace(SMALL, eva_adapter_dropout=0.3)).to(device).train()
    model.set_impl(TRITON)
    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):
        x = randn(batch, 4, 6, device=device)
        t, eva = randn(batch, device=device).sigmoid(), randn(batch, 4, 21, device=device, seed=1)
        results = []
        for run in (model, compiled):
            model.zero_grad()
            torch.manual_seed(batch)  # of dropout
            out = run(x, t, eva, return_dict=False)
            out.square().sum().backward()
            results.append([out, *(p.grad for p in model.parameters() if p.grad is not None)])
        eager, traced = results
        assert len(eager) == len(traced) > 40
        for a, b in zip(eager, traced, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
