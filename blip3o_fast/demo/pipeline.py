"""The stages of the demo: photos to shards, shards to a model, solvers for it, and a report.

Every stage continues where an interrupted run stopped.
"""

from pathlib import Path

import numpy as np
import torch

from blip3o_fast.benchmarking.environment import describe_environment
from blip3o_fast.checkpoint import locate_checkpoint
from blip3o_fast.data import EmbeddingDataset, SampleRecord
from blip3o_fast.data.manifest import Split
from blip3o_fast.demo.photos import demo_photos, folder_photos, heldout_scenes
from blip3o_fast.devices import cpu_has_bf16
from blip3o_fast.evaluation import Report
from blip3o_fast.evaluation.evaluate import EvaluationSettings, chosen, evaluate_model
from blip3o_fast.extraction.encoders import load_towers
from blip3o_fast.extraction.extract import extract
from blip3o_fast.extraction.image_sources import ImageRef
from blip3o_fast.extraction.views import ExtractionSettings, open_view
from blip3o_fast.flow import FittedSolver, save_solvers
from blip3o_fast.options.demo import DemoOptions
from blip3o_fast.pretrained import load_trained_model
from blip3o_fast.sampling import fit_solvers
from blip3o_fast.training import TrainingOptions, train

HELDOUT_FRACTION = 0.2
SEED = 0

MODEL = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "eva_adapter_layers": 2,
    "eva_adapter_dropout": 0.0,
    "initializer_range": 0.02,
    "rope_theta": 100.0,
}
"""Small enough for two cores. With 16 positions per axis, rotary periods should be short."""

VALIDATE_EVERY = 100  # steps
TRAINING = {
    "batch_size": 16,
    "learning_rate": 2e-3,
    "weight_decay": 0.05,
    "adam_beta2": 0.99,
    "ema_decay": 0.99,
    "simple_scale_factor": "auto",
    "zero_time_fraction": 0.5,
    "eval_num_samples": 32,
    "eval_inference_steps": 1,
    "use_heun_inference": False,
    "save_every_n_steps": 200,
}
"""Validated with one Euler step, which estimates the conditional mean."""

FITTED = (3, 5, 8)  # evaluations of the solvers that are fitted to the model
CONDITIONS = 12  # training crops that they are fitted on


def find_photos(options: DemoOptions) -> list[ImageRef]:
    """The photos of ``--images``, or those of installed packages."""
    refs = folder_photos(options.images) if options.images else demo_photos()
    if options.max_images is not None:
        refs = refs[:: max(1, len(refs) // max(1, options.max_images))][: options.max_images]
    return refs


def extract_tokens(
    refs: list[ImageRef], shards: Path, device: torch.device, progress: bool
) -> tuple[int, int]:
    """Encode the crops of all photos; the number of samples, and of photos held out."""
    towers = load_towers("lite", device=device)
    settings = extraction_settings(refs)
    extract(refs, towers, shards, settings, resume=shards.exists(), progress=progress)
    return len(EmbeddingDataset(shards)), EmbeddingDataset(shards, split="heldout").photos


def extraction_settings(refs: list[ImageRef]) -> ExtractionSettings:
    """Settings that decide the crops, used to extract them and to find one again."""
    heldout = heldout_scenes(refs, HELDOUT_FRACTION)
    return ExtractionSettings(
        seed=SEED, mirror=True, split=Split(HELDOUT_FRACTION, heldout_sources=heldout)
    )


def train_model(
    options: DemoOptions, folder: Path, device: torch.device
) -> tuple[tuple[int, float], ...]:
    """Train, or go on; the losses by step."""
    training = TrainingOptions(
        chunked_embeddings_dir=str(folder / "shards"),
        output_dir=str(folder / "run"),
        max_steps=options.steps,
        eval_every_n_steps=VALIDATE_EVERY,
        device="cuda" if device.type == "cuda" else "cpu",
        precision="bf16" if device.type == "cuda" or cpu_has_bf16() else "fp32",
        progress=options.progress,
        seed=SEED,
        **MODEL,
        **TRAINING,
    )
    return train(training).losses


def fit_solvers_to(run: Path, shards: Path, device: torch.device) -> dict[int, FittedSolver]:
    """Solvers of few evaluations for the best checkpoint of a run, kept beside it."""
    model = load_trained_model(run, device=device)
    if set(FITTED) <= set(model.fitted):
        return model.fitted
    data = EmbeddingDataset(shards, split="train")
    eva = data.read(chosen(data, CONDITIONS)).eva.to(device)
    generator = torch.Generator().manual_seed(SEED)
    fitted = fit_solvers(model, eva.to(model.dtype), evaluations=FITTED, generator=generator)
    save_solvers(locate_checkpoint(run), fitted)
    return fitted


def evaluate(
    options: DemoOptions,
    folder: Path,
    device: torch.device,
    refs: list[ImageRef],
    losses: tuple[tuple[int, float], ...],
) -> Report:
    """Measure the best checkpoint on held-out crops beside the baselines."""
    model = load_trained_model(folder / "run", device=device)
    by_key = {ref.key: ref for ref in refs}
    settings = extraction_settings(refs)

    def crop(record: SampleRecord) -> np.ndarray | None:
        ref = by_key.get(record.key) or by_key.get(record.key.rpartition("#")[0])
        return None if ref is None else np.asarray(open_view(ref, record.key, settings))

    shards = folder / "shards"
    training = EmbeddingDataset(shards, split="train")
    heldout = EmbeddingDataset(shards, split="heldout")
    environment = describe_environment(device)
    facts = {
        "photos": f"{training.photos} to learn from, {heldout.photos} held out",
        "crops": f"{len(training)} to learn from, {len(heldout)} held out, "
        f"{options.max_samples} of these evaluated",
        "translation": "EfficientNet-Lite2 tokens [256, 120] to Lite0 tokens [256, 112]",
        "model": f"{model.get_num_parameters():,} parameters, {options.steps} steps of "
        f"{TRAINING['batch_size']} samples",
        "device": environment["device"],
        "versions": ", ".join(f"{name} {x}" for name, x in environment["versions"].items()),
        "commit": environment["commit"] or "not run from a clone",
    }
    return evaluate_model(
        model,
        training,
        heldout,
        EvaluationSettings(
            evaluations=options.evaluations,
            batch_size=16,  # whose activations a CPU's cache holds
            max_samples=options.max_samples,
            seed=SEED,
        ),
        title="EfficientNet-Lite2 to Lite0 by rectified flow, on held-out photos",
        facts=facts,
        history=losses,
        image_of=crop,
        progress=options.progress,
    )
