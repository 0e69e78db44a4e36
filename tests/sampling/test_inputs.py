"""Bad input: one clear error each, before any work."""

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from blip3o_fast import BLIP3oDiT, SamplingPlan, generate
from blip3o_fast.errors import NonFiniteSamples
from blip3o_fast.sampling import inputs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "num_inference_steps: expected at least 1, got 0"),
        ({"steps": -3}, "got -3"),
        ({"solver": "rk45"}, "solver: expected one of euler, heun, midpoint, rk4, adams"),
        ({"time_grid": "cosine"}, "time_grid: expected ascending, published"),
        ({"time_grid": [0.0, 1.0]}, "expected 3 increasing times from 0 to 1"),
        ({"time_grid": [0.0, 0.7, 0.5]}, "increasing times"),
        ({"time_grid": [0.0, float("nan"), 1.0]}, "increasing times"),
        ({"time_grid": []}, r"expected 3 increasing times from 0 to 1, got \[\]"),
        ({"time_grid": torch.tensor([0.0, 0.7, 0.5])}, "increasing times"),
        ({"time_grid": torch.tensor(0.5)}, "increasing times"),
        ({"time_grid": torch.zeros(3, 2)}, "increasing times"),
        ({"time_grid": 3}, "increasing times"),
        ({"time_grid": [0.0, "x", 1.0]}, "increasing times"),
        ({"dtype": torch.int8}, "dtype: expected one of"),
        ({"graph": True, "compile": True}, "expected graph or compile, got both"),
        ({"working_memory": 0}, 'working_memory: expected at least 1 byte, or "L2", got 0'),
        ({"working_memory": "L3"}, "working_memory: expected at least 1 byte, or .*got 'L3'"),
        ({"guidance_scale": float("nan")}, "guidance_scale: expected a finite number, got nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale: expected a finite number, got inf"),
    ],
)
def test_plan(model, options, message):
    with pytest.raises(ValueError, match=message):
        SamplingPlan(model, **{"steps": 2, **options})


def test_times_may_be_a_tensor(model, draw):
    eva, noise = draw(model)
    listed = SamplingPlan(model, steps=2, time_grid=[0.0, 0.25, 1.0])(eva, noise)
    times = torch.tensor([0.0, 0.25, 1.0])
    assert torch.equal(SamplingPlan(model, steps=2, time_grid=times)(eva, noise), listed)


def nan(x):
    x = x.clone()
    x[1, 2, 3] = torch.nan
    return x


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda eva: eva.numpy(), r"eva_features: expected a tensor of shape .*, got ndarray"),
        (lambda eva: eva[0], r"eva_features: expected shape \[B, N=6, E=12\], got \[6, 12\]"),
        (lambda eva: eva[:, :5], r"N=6, E=12\], got \[2, 5, 12\]"),
        (lambda eva: eva[..., :7], r"got \[2, 6, 7\]"),
        (lambda eva: eva[:0], "at least one sample, got an empty batch"),
        (lambda eva: eva.long(), "eva_features: expected a floating dtype, got torch.int64"),
        (lambda eva: eva.to("meta"), "eva_features: expected cpu, the model's device, got meta"),
        (lambda eva: eva.requires_grad_(), "requires no gradient.*pass eva_features.detach"),
        (nan, "eva_features: expected finite values, got NaN or Inf in sample 1"),
        (lambda eva: nan(eva) * torch.inf, "got NaN or Inf in sample 0"),
    ],
)
def test_features(model, draw, change, message):
    eva, noise = draw(model)
    with pytest.raises(ValueError, match=message):
        SamplingPlan(model, steps=1)(change(eva), noise)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda noise: noise[:1], r"noise: expected shape \[B=2, N=6, C=10\], got \[1, 6, 10\]"),
        (lambda noise: noise[..., :3], r"got \[2, 6, 3\]"),
        (lambda noise: noise.int(), "noise: expected a floating dtype, got torch.int32"),
        (lambda noise: noise.to("meta"), "noise: expected cpu, the device of eva_features"),
        (nan, "noise: expected finite values, got NaN or Inf in sample 1"),
    ],
)
def test_noise(model, draw, change, message):
    eva, noise = draw(model)
    with pytest.raises(ValueError, match=message):
        SamplingPlan(model, steps=1)(eva, change(noise))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_samples_beyond_the_range_of_the_dtype_are_named(make_model, draw, dtype):
    model = make_model()
    with torch.no_grad():
        model.output_proj.bias.fill_(torch.inf if dtype == torch.float32 else 6e4)
        model.output_proj.weight.zero_()
        model.output_proj.bias[0] = 0
    eva, noise = draw(model, 3)
    remedy = "use dtype=torch.bfloat16" if dtype == torch.float16 else "the weights of the model"
    plan = SamplingPlan(model, steps=2, dtype=dtype)
    with pytest.raises(NonFiniteSamples, match=rf"NaN or Inf in 0, 1, 2 of 3; .*{remedy}"):
        plan(eva.to(dtype), (noise + 1e4).to(dtype))


def test_one_bad_sample_of_a_batch_is_named(make_model, draw):
    eva, noise = draw(make_model(), 4)
    noise[2] = 3e38
    with pytest.raises(NonFiniteSamples) as caught:
        SamplingPlan(make_model(), steps=2)(eva, noise)
    assert caught.value.samples == (2,)


def test_sources_of_noise_exclude_each_other(model, draw):
    eva, noise = draw(model)
    with pytest.raises(ValueError, match="expected noise, a generator or seeds"):
        generate(model, eva, 1, noise=noise, seeds=[1, 2])
    with pytest.raises(ValueError, match="expected a generator or seeds, got both"):
        generate(model, eva, 1, generator=torch.Generator(), seeds=[1, 2])
    with pytest.raises(ValueError, match="seeds: expected 2, one per sample, got 3"):
        generate(model, eva, 1, seeds=[1, 2, 3])


def test_model_without_weights(model, draw):
    eva, noise = draw(model)
    with torch.device("meta"):
        empty = BLIP3oDiT(model.config)
    with pytest.raises(ValueError, match="model: expected loaded weights, got parameters on the"):
        SamplingPlan(empty, steps=1)(eva, noise)


def test_graph_without_cuda(model, draw):
    eva, noise = draw(model)
    with pytest.raises(ValueError, match="graph=True: CUDA graphs need a CUDA device, got cpu"):
        SamplingPlan(model, steps=1, graph=True)(eva, noise)


def test_capture_inside_a_capture(model, draw, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    eva, noise = draw(model)
    inputs.starting_noise(model, eva, noise, None, None)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match="outside"):
        inputs.starting_noise(model, torch.empty(2, 6, 12, device="cuda"), None, None, None)


def test_guidance_without_condition_dropout_warns_once(make_model, draw):
    model = make_model(condition_dropout=0.0)
    eva, noise = draw(model)
    with pytest.warns(UserWarning, match="guidance_scale=2 on a model trained without"):
        generate(model, eva, 1, noise=noise, guidance_scale=2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, eva, 1, noise=noise, guidance_scale=2.0)
        generate(make_model(), eva, 1, noise=noise, guidance_scale=2.0)


@pytest.mark.parametrize("replaced", ["hook", "subclass"])
def test_projections_that_cannot_be_packed(model, draw, replaced):
    eva, noise = draw(model)
    projection = model.blocks[0].self_attn.q_proj
    if replaced == "hook":
        projection.register_forward_hook(lambda *_: None)
    else:

        class LoRA(torch.nn.Linear):
            def forward(self, x):
                return 2 * super().forward(x)

        projection.__class__ = LoRA
    with pytest.raises(TypeError, match=r"without hooks.*merge adapters"):
        generate(model, eva, 1, noise=noise)


def test_a_cpu_without_bf16_samples_in_fp32_and_says_so_once(model, draw, monkeypatch):
    monkeypatch.setattr("blip3o_fast.sampling.plan.cpu_has_bf16", lambda: False)
    inputs.warn_of_bf16.cache_clear()
    eva, noise = draw(model)
    plan = SamplingPlan(model, steps=2, dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match=r"does not multiply bf16 .*computes in fp32"):
        found = plan(eva, noise)
    assert torch.equal(found, SamplingPlan(model, steps=2)(eva, noise))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan(eva, noise)
