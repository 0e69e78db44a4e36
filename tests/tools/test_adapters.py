"""Projections that are not plain: LoRA, parametrisations, pruning, hooks, compiled blocks."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from blip3o_fast import BLIP3oDiT, SamplingPlan
from tests.tools.models import build, inputs, velocity

PROJECTIONS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("cross_attn.q_proj", "cross_attn.k_proj", "cross_attn.v_proj", "cross_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
PLACES = (
    *(f"blocks.1.{name}" for name in PROJECTIONS),
    *("input_proj", "output_proj", "eva_adapter.residual_proj", "eva_adapter.gate.0"),
    *("eva_adapter.adaptation_layers.4", "timestep_embedder.mlp.2"),
    "blocks.0.self_attn_ada_ln_pre.adaLN_modulation.1",
)


def replace(model, place, make):
    parent, _, name = place.rpartition(".")
    owner = model.get_submodule(parent)
    replacement = make(model.get_submodule(place))
    if name.isdigit():
        owner[int(name)] = replacement
    else:
        setattr(owner, name, replacement)


class Plus(nn.Module):
    """A linear layer wrapped by somebody: every output has a gain of its own."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.extra = nn.Parameter(torch.linspace(0.5, 2, layer.out_features))

    def forward(self, x):
        return self.extra * self.layer(x)


@pytest.mark.parametrize("place", PLACES)
def test_a_replaced_projection_is_called(place):
    """Same output as scaling the weights, and a gradient for what was added."""
    model, scaled = build(), build()
    replace(model, place, Plus)
    extra = model.get_submodule(place).extra
    with torch.no_grad():
        for p in scaled.get_submodule(place).parameters():
            p.mul_(extra if p.dim() == 1 else extra[:, None])
    torch.testing.assert_close(velocity(model), velocity(scaled), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(velocity(model), velocity(build()), rtol=1e-2)
    velocity(model).square().sum().backward()
    assert (extra.grad.abs() > 0).all()
    x, _, eva = inputs()
    with pytest.raises(TypeError, match=f"at {place} .*got .*Plus; merge adapters"):
        SamplingPlan(model, steps=1)(eva, x)


@pytest.mark.parametrize("place", [*PLACES, "blocks.0", "blocks.1.mlp", "eva_adapter"])
def test_hooks_fire_and_are_never_ignored(place):
    model, seen = build(), []
    plain = velocity(model)
    handle = model.get_submodule(place).register_forward_hook(
        lambda module, args, out: seen.append(module)
    )
    torch.testing.assert_close(velocity(model), plain, rtol=1e-4, atol=1e-5)
    assert seen == [model.get_submodule(place)]
    x, _, eva = inputs()
    with pytest.raises(TypeError, match=f"at {place} .*without hooks, got hooks"):
        SamplingPlan(model, steps=1)(eva, x)
    handle.remove()
    assert SamplingPlan(model, steps=1)(eva, x).isfinite().all()


@pytest.mark.parametrize("target", ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "o_proj"])
def test_lora_learns_and_merges(target):
    peft = pytest.importorskip("peft")
    model, base = build(), velocity(build())
    config = peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    out = adapted(*inputs(), return_dict=False)
    assert (out - base).abs().max() > 1e-2
    out.sum().backward()
    lora = {name: p for name, p in adapted.named_parameters() if "lora_" in name}
    assert lora and all(p.grad.abs().sum() > 0 for p in lora.values())
    x, _, eva = inputs()
    with pytest.raises(TypeError, match="merge adapters"):
        model.generate(eva, 1, noise=x)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(velocity(merged), out, rtol=1e-4, atol=1e-5)
    assert merged.generate(eva, 1, noise=x).isfinite().all()


@pytest.mark.parametrize("place", ["blocks.0.self_attn.k_proj", "blocks.1.mlp.gate_proj"])
@pytest.mark.parametrize("how", ["spectral_norm", "weight_norm", "orthogonal", "prune"])
def test_parametrisations(place, how):
    """The output is that of the weight which the parametrisation computes."""
    model = build()
    layer = model.get_submodule(place)
    if how == "prune":
        prune.l1_unstructured(layer, "weight", amount=0.5)
    else:
        getattr(parametrizations, how)(layer)
    model.eval()
    expected = build()
    with torch.no_grad():
        expected.get_submodule(place).weight.copy_(layer.weight)
    if how != "weight_norm":
        assert not torch.equal(layer.weight, build().get_submodule(place).weight)
    torch.testing.assert_close(velocity(model), velocity(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor")
def test_dynamic_quantisation():
    model = build()
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear})
    with torch.no_grad():
        got, expected = velocity(quantised), velocity(model)
    assert not torch.equal(got, expected)
    assert (got - expected).norm() < 0.1 * expected.norm()


def test_compiled_block_is_saved_and_sampled(tmp_path):
    model, (x, _, eva) = build(), inputs()
    expected, sampled = velocity(model), model.generate(eva, 2, noise=x)
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    torch.testing.assert_close(velocity(model), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.generate(eva, 2, noise=x), sampled)
    model.save_pretrained(tmp_path)
    assert torch.equal(velocity(BLIP3oDiT.from_pretrained(tmp_path)), expected)


def test_weights_loaded_in_inference_mode(tmp_path):
    build().save_pretrained(tmp_path)
    with torch.inference_mode():
        model = BLIP3oDiT.from_pretrained(tmp_path)
    x, _, eva = inputs()
    for dtype in (None, torch.bfloat16):
        got = model.generate(eva, 2, noise=x, dtype=dtype)
        assert torch.equal(got, build().generate(eva, 2, noise=x, dtype=dtype))
