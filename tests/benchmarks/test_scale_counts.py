"""The counts behind ``SCALING.md`` against what the library does."""

from types import SimpleNamespace

import pytest
import scale_counts as counts
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from blip3o_fast.benchmarking import work
from blip3o_fast.benchmarking.shapes import Shape
from blip3o_fast.extraction.eva import EVAVisionConfig, EVAVisionTower
from blip3o_fast.flow import RectifiedFlowLoss
from blip3o_fast.ops import Impl
from blip3o_fast.pretrained import BLIP3oDiT
from blip3o_fast.sampling import SamplingPlan

CPU = torch.device("cpu")


def small(layers, tokens):
    return Shape("tiny", 1, tokens).config.replace(num_hidden_layers=layers)


def inputs(config):
    N, C, E = config.num_tokens, config.clip_embedding_size, config.eva_embedding_size
    return torch.randn(1, N, C), torch.rand(1), torch.randn(1, N, E)


def kept_for_backward(layers, tokens):
    """Bytes that autograd holds after a forward pass under autocast, parameters left out."""
    config = small(layers, tokens)
    with FakeTensorMode():
        model = BLIP3oDiT(config).train()
        model.set_impl(Impl.TRITON)
        own = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}
        kept = {}

        def pack(x):
            kept[x.untyped_storage()._cdata] = x.untyped_storage()
            return x

        x, t, eva = inputs(config)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            with torch.autocast("cpu", torch.bfloat16):
                velocity = model(x, t, eva, return_dict=False)
            loss = RectifiedFlowLoss(impl=Impl.TRITON)
            terms = loss(velocity, x, x + 1, x + 2, t)
    assert terms.total.requires_grad
    return sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in own)


def test_flops_of_an_encoder_are_those_that_torch_counts():
    config = EVAVisionConfig(64, 160, 3, 4, image_size=56)
    with torch.device("meta"):
        tower, image = EVAVisionTower(config), torch.empty(1, 3, 56, 56)
    with FlopCounterMode(display=False) as counter:
        tower(image)
    assert counts.tower_flops(config) == counter.get_total_flops()
    products = [x for x in tower.encoder.parameters() if x.dim() == 2]
    assert counts.tower_weights(config) == sum(x.numel() for x in products)


def test_fusions_of_base():
    """12 blocks of 256 tokens, 2 bytes a number; their products are those of an evaluation."""
    config = Shape("base").config
    rope, swiglu, joins = counts.fusions(config)
    assert rope.bytes == 12 * 256 * 2 * ((768 + 256) * 2 + 768 * 2)
    assert swiglu.bytes == 12 * 256 * 2 * 2048 * 4
    assert joins.bytes == 12 * 256 * 2 * 768 * 6
    assert (rope.launches, swiglu.launches, joins.launches) == (24, 12, 36)
    others = 12 * 2 * 256 * 768 * (1280 + 768) + 2 * 2 * 256 * 768 * 1024
    inside = sum(fusion.flops for fusion in (rope, swiglu, joins))
    assert inside + others == work.evaluation(config, 1, 2).flops


def test_activations_are_what_autograd_keeps():
    def a_token(layers):
        return (kept_for_backward(layers, 9) - kept_for_backward(layers, 4)) / 5

    one, two = a_token(1), a_token(2)
    config = small(1, 4)
    assert two - one == counts.block_activations(config)
    others = counts.other_activations(config, multiple=1)  # a CPU pads no width
    assert one - counts.block_activations(config) == others


def test_flops_are_what_torch_counts():
    config = small(2, 16)
    model = BLIP3oDiT(config).train()
    x, t, eva = inputs(config)
    with FlopCounterMode(display=False) as counter:
        model(x, t, eva, return_dict=False).sum().backward()
    shape = SimpleNamespace(config=config, batch=1)
    counted = counts.work.training_step(shape, 0, 2).flops
    assert counter.get_total_flops() == pytest.approx(counted, rel=0.02)


def test_sampling_weights_are_those_that_the_plan_packs():
    from blip3o_fast.sampling.cache import find_engine

    config = small(2, 16)
    model = BLIP3oDiT(config)
    plan = SamplingPlan(model, steps=1, dtype=torch.bfloat16)
    network = find_engine(model, torch.bfloat16, plan.impl).network
    adapter = sum(x.numel() for layer in network.adapter.layers for x in layer[:1])
    adapter += sum(
        layer.weight.numel() for layer in (network.adapter.gate, network.adapter.residual)
    )
    packed = network.nbytes() + counts.STORED * adapter
    assert counts.sampling_weights(config) == packed


def test_a_ring_moves_twice_the_gradients_but_for_a_share():
    config = Shape("base").config
    gradients = 4 * 227_474_014
    within, between = counts.all_reduce_seconds(config, 8)
    assert within == pytest.approx(gradients * 2 * 7 / 8 / 450e9) and between == 0
    _, eight = counts.all_reduce_seconds(config, 64)
    _, one = counts.all_reduce_seconds(config, 64, adapters=1)
    assert eight == pytest.approx(gradients / 8 * 2 * 7 / 8 / 50e9) and one == 8 * eight
    assert counts.all_reduce_seconds(config, 1) == (0, 0)


def test_published_sizes_and_bytes():
    config = Shape("base").config
    assert counts.sample_bytes(config) == (256 * 4096 * 2, 256 * 1024 * 2)
    assert counts.checkpoint_bytes(config, average=True) == (4 * 227_474_014, 12 * 227_474_014)
    assert counts.training_state(config, average=False) == 18 * 227_474_014
    heun = counts.translating_flops("base", 256, 50, "heun")
    one, two = (counts.translating_flops("base", 256, n, "euler") for n in (1, 2))
    assert heun == pytest.approx(one + 99 * (two - one))
