"""Training loops that know nothing of this library: transformers and accelerate."""

import copy
from dataclasses import FrozenInstanceError

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset

from blip3o_fast import BLIP3oCLIPDiTConfig, DiTConfig, RectifiedFlowLoss
from blip3o_fast.flow import interpolate
from tests.tools.models import build, inputs

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

PAIRS = TensorDataset(*inputs(16)[::2])


@pytest.fixture(autouse=True)
def own_accelerator():
    """accelerate keeps its settings for the whole process."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def flow_loss(model, clip, eva, seed=None):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    noise = torch.randn(clip.shape, generator=generator)
    t = torch.rand(len(clip), generator=generator)
    x_t = interpolate(clip, noise, t)
    return RectifiedFlowLoss()(model(x_t, t, eva, return_dict=False), x_t, clip, noise, t).total


class FlowTrainer(transformers.Trainer):
    """What a user writes: a loss that calls the model, always on the same noise in evaluation."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = flow_loss(model, inputs["clip"], inputs["eva"], None if model.training else 5)
        return (loss, {}) if return_outputs else loss


def collate(pairs):
    clip, eva = map(torch.stack, zip(*pairs, strict=True))
    return {"clip": clip, "eva": eva}


def fit(folder, resume=None, **options):
    model = build(dropout_prob=0.2)
    arguments = transformers.TrainingArguments(
        folder,
        max_steps=4,
        save_steps=2,
        eval_steps=2,
        eval_strategy="steps",
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        remove_unused_columns=False,
        label_names=["clip"],
        disable_tqdm=True,
        report_to=[],
        use_cpu=True,
        **options,
    )
    trainer = FlowTrainer(
        model, arguments, collate, train_dataset=PAIRS, eval_dataset=TensorDataset(*PAIRS[:4])
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def assert_same_weights(model, other):
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_transformers_trainer(tmp_path):
    """Trains, evaluates, saves and resumes."""
    trainer = fit(tmp_path / "whole")
    model = trainer.model
    start = build()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, start.get_parameter(n))}
    assert {n for n, _ in model.named_parameters()} - moved == {"pos_embed"}
    with torch.no_grad():
        expected = flow_loss(model.eval(), *PAIRS[:4], seed=5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-5)
    saved = build()
    saved.load_state_dict(load_file(tmp_path / "whole" / "checkpoint-4" / "model.safetensors"))
    assert_same_weights(saved, model)
    resumed = fit(tmp_path / "resumed", resume=tmp_path / "whole" / "checkpoint-2")
    assert_same_weights(resumed.model, model)
    x, _, eva = inputs()
    assert torch.equal(model.generate(eva, 2, noise=x), saved.generate(eva, 2, noise=x))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
def test_transformers_trainer_recomputes(tmp_path):
    plain = fit(tmp_path / "plain")
    recomputed = fit(tmp_path / "recomputed", gradient_checkpointing=True)
    assert recomputed.model.gradient_checkpointing and not plain.model.gradient_checkpointing
    assert_same_weights(recomputed.model, plain.model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation_checkpointing_kwargs": {"use_reentrant": True}}, "expected use_reentrant=Fa"),
        ({"activation_checkpointing_kwargs": {"debug": True}}, "nothing else, got {'debug': True}"),
        ({"every_n_layers": 2}, "expected every_n_layers=1 .* got every_n_layers=2"),
        ({"offload": True}, "expected .* offload=False, got .* offload=True"),
    ],
)
def test_other_ways_to_recompute_are_refused(options, message):
    model = build()
    with pytest.raises(ValueError, match=message):
        model.activation_checkpointing_enable(**options)
    assert not model.gradient_checkpointing


@pytest.mark.parametrize("kind", [DiTConfig, BLIP3oCLIPDiTConfig])
def test_a_configuration_takes_use_cache_and_nothing_else(kind):
    """``Trainer`` sets it on the configuration of every model. It is no field."""
    config, fresh = kind(), kind()
    config.use_cache = False
    assert config == fresh and hash(config) == hash(fresh)
    assert config.to_dict() == fresh.to_dict() and "use_cache" not in config.to_dict()
    for name in ("hidden_size", "use_cach"):
        with pytest.raises(FrozenInstanceError, match=f"{name}: a configuration is fixed"):
            setattr(config, name, 1)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(tmp_path, precision):
    """The steps of a plain loop; the state comes back; the model samples."""
    model, plain = build(), build()
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    prepared, optimizer, batches = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=1e-2), DataLoader(PAIRS, 4)
    )
    own = torch.optim.SGD(plain.parameters(), lr=1e-2)
    torch.manual_seed(0)
    for clip, eva in batches:
        accelerator.backward(flow_loss(prepared, clip, eva))
        optimizer.step()
        optimizer.zero_grad()
    torch.manual_seed(0)
    for clip, eva in DataLoader(PAIRS, 4):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = flow_loss(lambda *a, **k: plain(*a, **k).float(), clip, eva)
        loss.backward()
        own.step()
        own.zero_grad()
    assert_same_weights(model, plain)
    accelerator.save_state(tmp_path)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    accelerator.load_state(tmp_path)
    assert_same_weights(model, plain)
    x, _, eva = inputs()
    expected = plain.generate(eva, 2, noise=x)
    assert torch.equal(prepared.generate(eva, 2, noise=x), expected)
    for keep in (True, False):
        unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=keep)
        assert torch.equal(unwrapped.generate(eva, 2, noise=x), expected)


def test_a_replaced_forward_is_never_ignored():
    model, (x, _, eva) = build(), inputs()
    forward = model.forward
    model.forward = lambda *arguments, **options: 2 * forward(*arguments, **options)
    with pytest.raises(TypeError, match=r"at the model expected .* got a replaced forward"):
        model.generate(eva, 1, noise=x)
    model = build()
    mlp = model.blocks[0].mlp
    mlp.forward = copy.deepcopy(mlp).forward
    with pytest.raises(TypeError, match=r"at blocks.0.mlp expected .* got a replaced forward"):
        model.generate(eva, 1, noise=x)
