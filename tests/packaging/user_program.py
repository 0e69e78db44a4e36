"""A small program of a user, which a strict type checker must accept."""

from pathlib import Path
from typing import assert_type

import torch
from torch import Tensor

from blip3o_fast import (
    BLIP3oDiT,
    DiTConfig,
    FittedSolver,
    RectifiedFlowLoss,
    SamplingPlan,
    extract_eva_features,
    fit_solver,
    load_trained_model,
)
from blip3o_fast.data import EmbeddingDataset
from blip3o_fast.evaluation import token_cosines
from blip3o_fast.flow import SOLVERS, RungeKutta
from blip3o_fast.training import TrainingOptions, TrainingResult, train


def translate(folder: Path, eva: Tensor) -> Tensor:
    model = load_trained_model(folder, device="cpu")
    assert_type(model, BLIP3oDiT)
    assert_type(model.config, DiTConfig)
    return model.generate(eva, num_inference_steps=1, use_heun=False)


def sample(model: BLIP3oDiT, eva: Tensor) -> Tensor:
    solver = fit_solver(model, eva, evaluations=5)
    assert_type(solver, FittedSolver)
    solver.save("my_model")
    plan = SamplingPlan(model, solver=solver, dtype=torch.bfloat16)
    return plan(eva, seeds=[0, 1])


def learn(shards: str) -> float:
    result = train(TrainingOptions(chunked_embeddings_dir=shards, output_dir="run", max_steps=10))
    assert_type(result, TrainingResult)
    return result.losses[-1][1]


def measure(folder: str) -> Tensor:
    data = EmbeddingDataset(folder, split="heldout")
    batch = data.read(range(len(data)))
    model = BLIP3oDiT.from_pretrained("hf:owner/name", revision="v1")
    return token_cosines(model.generate(batch.eva), batch.clip)


def own_step(model: BLIP3oDiT, x: Tensor, noise: Tensor, t: Tensor, eva: Tensor) -> Tensor:
    state = torch.lerp(noise, x, t[:, None, None])
    velocity = model(hidden_states=state, timestep=t, encoder_hidden_states=eva)
    assert_type(extract_eva_features("photo.jpg"), Tensor)
    return RectifiedFlowLoss()(velocity["velocity_prediction"], state, x, noise, t).total


SOLVERS["mine"] = RungeKutta(use="my own", fractions=(0.0,), stages=(), weights=(1.0,))
