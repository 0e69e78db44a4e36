"""The network's own promises: inputs, gradients, conventions, packing."""

import pytest
import torch
import torch.nn.functional as F
from golden_data import relative_error

from blip3o_fast import DiTConfig, ops
from blip3o_fast.conventions import clean_coefficient, skip_coefficient
from blip3o_fast.model import DiT, layers
from blip3o_fast.model.adapter import padded
from blip3o_fast.model.layers import AdaLN, RMSNorm, modulations, project
from blip3o_fast.ops import Impl

B, N, C, E, D = 2, 12, 6, 10, 32


def config(**fields):
    small = {
        "hidden_size": D,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
        "eva_embedding_size": E,
        "clip_embedding_size": C,
        "num_tokens": N,
        "grid": (1, 3, 4),
        "eva_adapter_layers": 2,
        "zero_init_output": False,
        "initializer_range": 1.0,
    }
    return DiTConfig(**{**small, **fields})


def inputs(batch=B, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, N, C, generator=generator).to(dtype)
    eva = torch.randn(batch, N, E, generator=generator).to(dtype)
    return x, torch.linspace(0.1, 0.9, batch), eva


def build(seed=0, **fields):
    torch.manual_seed(seed)
    model = DiT(config(**fields)).eval()
    for name, parameter in model.named_parameters():
        if "adaLN_modulation" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("fields", [{}, {"use_sandwich_norm": False}, {"use_eva_adapter": False}])
def test_every_parameter_gets_a_gradient(fields):
    model = build(**fields)
    model(*inputs(), return_dict=False).square().sum().backward()
    dead = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert dead == {"pos_embed"}


def test_learned_positions_are_used_without_rotary_grid():
    model = build(use_3d_rope=False)
    model(*inputs(), return_dict=False).square().sum().backward()
    assert model.pos_embed.grad is not None and model.pos_embed.grad[:, :N].any()


def test_gradients_match_finite_differences():
    model = build().double()
    x, t, eva = inputs(batch=1, dtype=torch.float64)
    x.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: model(x, t, eva, return_dict=False), x, atol=1e-4, fast_mode=True
    )


def test_checkpointing_changes_nothing_but_memory():
    plain, again = build().train(), build().train()
    again.gradient_checkpointing_enable()
    for model in (plain, again):
        torch.manual_seed(1)
        model(*inputs(), return_dict=False).square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), again.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, msg=name)


@pytest.mark.parametrize("fields", [{}, {"conventions": "published"}, {"use_sandwich_norm": False}])
def test_a_wrapped_block_computes_what_one_product_for_all_blocks_gives(fields, monkeypatch):
    """A hook on one block is enough to have every block compute its own modulations and keys."""
    monkeypatch.setattr(layers, "is_one_product", lambda activated: activated.shape[0] > 0)
    together, apart = build(**fields), build(**fields)
    seen = []
    apart.blocks[1].register_forward_pre_hook(lambda block, args: seen.append(block))
    for model in (together, apart):
        model(*inputs(), return_dict=False).square().sum().backward()
        monkeypatch.undo()  # the second one as on a CPU
    assert seen
    for (name, a), b in zip(together.named_parameters(), apart.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_linears_with_and_without_bias_are_not_one_product():
    """Somebody may have put a biased layer in the place of one without."""
    layers = torch.nn.Linear(8, 4), torch.nn.Linear(8, 4, bias=False)
    x = torch.randn(3, 8)
    torch.testing.assert_close(project(x, *layers), torch.cat([u(x) for u in layers], -1))
    biased = torch.nn.Linear(8, 4), torch.nn.Linear(8, 2)
    torch.testing.assert_close(project(x, *biased), torch.cat([u(x) for u in biased], -1))


def test_samples_do_not_see_each_other():
    model = build()
    x, t, eva = inputs(batch=3)
    together = model(x, t, eva, return_dict=False)
    for i in (2, 0, 1):
        alone = model(x[i : i + 1], t[i : i + 1], eva[i : i + 1], return_dict=False)
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-5)


def test_consistent_cross_attention_knows_positions():
    """Moving the condition's tokens moves nothing but a blind cross-attention would not notice."""
    x, t, eva = inputs()
    moved = eva.roll(1, dims=1)
    blind, seeing = build(conventions="published"), build()
    assert torch.allclose(blind(x, t, eva, False), blind(x, t, moved, False), atol=1e-5)
    assert not torch.allclose(seeing(x, t, eva, False), seeing(x, t, moved, False), atol=1e-2)


def test_skip_is_the_best_linear_guess():
    """c = E[v x_t] / E[x_t^2] for unit-variance data: -1 at noise, 0 half-way, 1 at data."""
    generator = torch.Generator().manual_seed(0)
    x1, noise = torch.randn(2, 400_000, generator=generator, dtype=torch.float64)
    for t in (0.0, 0.2, 0.5, 0.7, 1.0):
        x_t = (1 - t) * noise + t * x1
        expected = (x_t @ (x1 - noise)) / (x_t @ x_t)
        got = skip_coefficient(torch.tensor(t, dtype=torch.float64))
        assert got.item() == pytest.approx(expected.item(), abs=5e-3)


def test_network_sees_the_best_linear_guess_of_the_data():
    """E[x_1 x_t] / E[x_t^2] for unit-variance data: nothing at noise, everything at data."""
    generator = torch.Generator().manual_seed(0)
    x1, noise = torch.randn(2, 400_000, generator=generator, dtype=torch.float64)
    for t in (0.0, 0.2, 0.5, 0.7, 1.0):
        x_t = (1 - t) * noise + t * x1
        expected = (x_t @ x1) / (x_t @ x_t)
        got = clean_coefficient(torch.tensor(t, dtype=torch.float64))
        assert got.item() == pytest.approx(expected.item(), abs=5e-3)


def test_one_euler_step_does_not_depend_on_the_noise():
    model, (x, _, eva) = build(), inputs()
    start = torch.zeros(len(x))
    first, second = (noise + model(noise, start, eva, False) for noise in (x, x.flip(0) * 2))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def test_untrained_model_predicts_the_linear_guess():
    x, t, eva = inputs()
    expected = skip_coefficient(t)[:, None, None] * x
    torch.testing.assert_close(build(zero_init_output=True)(x, t, eva, False), expected)
    assert not build(zero_init_output=True, conventions="published")(x, t, eva, False).any()


@pytest.mark.parametrize("conventions", ["consistent", "published"])
def test_condition_enters_the_stream_token_by_token(conventions):
    model = build(conventions=conventions)
    x, t, eva = inputs()
    context = model.eva_adapter(eva)
    streams = []
    model.blocks[0].register_forward_pre_hook(
        lambda block, args, given: streams.append(args[0] + (args[1].y if args[1] else 0)),
        with_kwargs=True,
    )
    model(x, t, eva)
    seen = clean_coefficient(t)[:, None, None] * x if conventions == "consistent" else x
    expected = context if conventions == "consistent" else torch.zeros_like(context)
    torch.testing.assert_close(streams[0] - model.input_proj(seen), expected, rtol=1e-4, atol=1e-5)


def test_timestep_scale_follows_conventions():
    published, consistent = build(conventions="published"), build()
    consistent.load_state_dict(published.state_dict())
    t = torch.tensor([0.25, 0.5])
    expected = consistent.timestep_embedder(t)
    torch.testing.assert_close(published.timestep_embedder(1000 * t), expected)


@pytest.mark.parametrize("multiple", [8, 64])
def test_padding_the_adapter_changes_nothing(multiple):
    model = build(hidden_size=36, num_attention_heads=3, num_key_value_heads=1)
    adapter, eva = model.eva_adapter, inputs()[2]
    linear, norm = adapter.adaptation_layers[0], adapter.adaptation_layers[1]

    def project(x, linear):
        return F.linear(x, *padded(linear.weight, linear.bias, x.shape[-1], multiple))

    wide = project(eva, linear)
    assert wide.shape[-1] % multiple == 0
    torch.testing.assert_close(wide[..., : linear.out_features], linear(eva))
    from blip3o_fast import ops

    h = ops.adapter_norm(wide, norm.weight, norm.bias, eps=norm.eps)
    second = adapter.adaptation_layers[4]
    expected = second(torch.nn.functional.gelu(norm(linear(eva))))
    torch.testing.assert_close(project(h, second)[..., : second.out_features], expected)


def test_compiles_whole():
    model = build()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = compiled(*inputs(), return_dict=False)
    torch.testing.assert_close(got, model(*inputs(), return_dict=False), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, t, e: (x[..., :-1], t, e), r"hidden_states: expected shape \[B, N=12, C=6\]"),
        (lambda x, t, e: (x[:, :-1], t, e), r"hidden_states: .* got \[2, 11, 6\]"),
        (lambda x, t, e: (x, t, e[..., :-1]), r"encoder_hidden_states: .*E=10.* got \[2, 12, 9\]"),
        (lambda x, t, e: (x, 0.5, e), r"timestep: expected a tensor of shape \[B=2\], got float"),
        (lambda x, t, e: (x, (1000 * t).long(), e), "timestep: expected numbers from 0 to 1"),
        (lambda x, t, e: (x, t[:1], e), r"timestep: expected shape \[B=2\], got \[1\]"),
        (lambda x, t, e: (x.half(), t, e), "hidden_states: expected torch.float32.*torch.float16"),
        (lambda x, t, e: (x, t, e.to("meta")), "encoder_hidden_states: expected cpu.* got meta"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        build()(*change(*inputs()))


def test_unknown_op_is_named():
    with pytest.raises(
        ValueError, match=r"unknown op 'softmax'; expected one of adapter_mix, .*sandwich_norm"
    ):
        build().set_impl(Impl.REFERENCE, softmax=Impl.REFERENCE)


def test_two_epsilons_are_one_and_a_gain():
    """AdaLN keeps 1e-6 whatever ``rms_norm_eps`` says: values and gradients by hand, in fp64."""
    small = config(conventions="published", rms_norm_eps=0.05)
    outer, ada_ln = RMSNorm(16, small.norm_gain).double(), AdaLN(16).double()
    generator = torch.Generator().manual_seed(0)
    for p in (*outer.parameters(), *ada_ln.parameters()):
        torch.nn.init.normal_(p, generator=generator)
    x = torch.randn(2, 3, 16, generator=generator, dtype=torch.float64)
    activated = torch.randn(2, 16, generator=generator, dtype=torch.float64)
    ((w1, w2, shift, scale),) = modulations([(outer, ada_ln)], activated)

    def rms(x, weight, eps):
        return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()

    expected = rms(rms(x, outer.weight, 0.05), w2, 1e-6)
    expected = expected * (1 + scale[:, None]) + shift[:, None]
    got = ops.sandwich_norm(x, w1, w2, shift, scale, eps=small.rms_norm_eps)
    assert relative_error(got, expected) < 1e-14
    upstream = torch.randn(got.shape, generator=generator, dtype=torch.float64)
    gradients = (
        torch.autograd.grad(out, outer.weight, upstream, retain_graph=True)[0]
        for out in (got, expected)
    )
    assert relative_error(*gradients) < 1e-12
