"""Fitted solvers beside the usual ones: errors, quality of samples, dtypes, and where they fail.

    python benchmarks/fitted_solvers.py --model_path RUN --embeddings_dir SHARDS --json OUT

Solvers are fitted on training crops and measured on held-out ones: at guidance 1, or 2 if training
dropped conditions. Four questions:

* error: the relative distance of final states from the reference, from the same noise;
* samples: are they like those of the reference? Against the true tokens: token cosine and R@1.
  Against samples of the reference from *other* noise: variance ratio and energy distance, where the
  reference itself from its own noise is the floor;
* dtype: the error when bf16 or FP8 evaluations drive the solver, against the fp32 reference;
* transfer: the error of the same coefficients on conditions that are no image (normal noise with
  the mean and the deviation of each channel), and at another guidance weight.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from result_tables import show
from torch import Tensor

from blip3o_fast import BLIP3oDiT, FittedSolver, SamplingPlan, load_trained_model
from blip3o_fast.atomic import write_json
from blip3o_fast.benchmarking.environment import describe_environment
from blip3o_fast.data import Batch, EmbeddingDataset
from blip3o_fast.evaluation import MetricAccumulator
from blip3o_fast.evaluation.baselines import MeanPredictor
from blip3o_fast.evaluation.evaluate import check_fit, chosen, read_batches
from blip3o_fast.ops import Impl, e4m3_refusal
from blip3o_fast.sampling import fit_solvers
from blip3o_fast.sampling.fit import default_reference, solver_errors
from blip3o_fast.seeds import sample_seed
from blip3o_fast.words import GridName

PEERS = ("heun", "adams_bashforth2", "adams_bashforth4")
MANY = 100  # evaluations of Heun's method, as the published sampler has
OTHER_NOISE = 1  # seed of the samples of the reference that others are compared with


def main() -> None:
    """Fit, measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--model_path", required=True, nargs="+", help="checkpoints or training runs")
    add("--embeddings_dir", required=True, help="shards with a held-out side")
    add("--evaluations", type=int, nargs="+", default=[3, 5, 8, 12], help="of the solvers")
    add("--conditions", type=int, default=16, help="training crops to fit on")
    add("--max_samples", type=int, default=48, help="held-out crops, evenly spread")
    add("--time_grid", choices=get_args(GridName), help="of the sampler that is approximated")
    add("--seed", type=int, default=0, help="of the noise")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device")
    add("--json", required=True, help="where to write the figures")
    args = parser.parse_args()
    device = torch.device(args.device)
    training = EmbeddingDataset(args.embeddings_dir, split="train")
    heldout = EmbeddingDataset(args.embeddings_dir, split="heldout")
    models = []
    for path in args.model_path:
        model = load_trained_model(path, device=device).float()
        check_fit(model, heldout)
        scale = 2.0 if model.config.condition_dropout else 1.0
        models.append(measured(model, scale, training, heldout, args))
        print(json.dumps(models[-1]), flush=True)
    facts = {
        "benchmark": "fitted_solvers",
        "environment": describe_environment(device),
        "conditions": args.conditions,
        "samples": min(args.max_samples, len(heldout)),
        "sources": heldout.photos,
        "models": models,
    }
    write_json(Path(args.json), facts)
    print(show(facts))


def measured(
    model: BLIP3oDiT,
    scale: float,
    training: EmbeddingDataset,
    heldout: EmbeddingDataset,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """All figures of one model at one guidance weight."""
    device = model.device
    eva = training.read(chosen(training, args.conditions)).eva.to(device).float()
    started = time.perf_counter()
    fitted = fit_solvers(
        model,
        eva,
        evaluations=args.evaluations,
        guidance_scale=scale,
        time_grid=args.time_grid,
        generator=torch.Generator().manual_seed(args.seed),
    )
    seconds = time.perf_counter() - started
    indices = chosen(heldout, args.max_samples)
    batches = list(read_batches(heldout, indices, 16, device, None))
    unseen = torch.cat([batch.eva.float() for batch in batches])[:: max(1, len(indices) // 16)]
    plans = {("fitted", n): plan(model, solver) for n, solver in fitted.items()}
    plans |= dict(classical(model, scale, (*args.evaluations, MANY), args.time_grid))
    reference = default_reference(model, scale, args.time_grid)
    errors = solver_errors(plans, reference, unseen, torch.Generator().manual_seed(args.seed + 1))
    return {
        "conventions": model.config.conventions,
        "time_grid": args.time_grid,
        "parameters": model.get_num_parameters(),
        "guidance_scale": scale,
        "reference": next(iter(fitted.values())).reference,
        "fit_seconds": seconds,
        "stored_errors": {n: solver.error for n, solver in fitted.items()},
        "errors": [
            {"solver": name, "evaluations": count, "error": error}
            for (name, count), error in errors.items()
        ],
        "samples": samples(plans, reference, batches, training, args.seed),
        "dtypes": dtypes(model, fitted, reference, unseen[:8], args.seed),
        "transfer": transfer(model, fitted, eva, unseen, args),
    }


def plan(model: BLIP3oDiT, solver: FittedSolver, **options: Any) -> SamplingPlan:
    """A sampler with a fitted solver."""
    return SamplingPlan(model, solver=solver, guidance_scale=solver.guidance_scale, **options)


def classical(
    model: BLIP3oDiT, scale: float, counts: tuple[int, ...], grid: GridName | None
) -> Iterator[tuple[tuple[str, int], SamplingPlan]]:
    """The usual solvers with as many evaluations, and Heun's method with many."""
    for count in counts:
        for name in PEERS if count != MANY else PEERS[:1]:
            stages = 2 if name == "heun" else 1
            if count % stages == 0:
                steps = count // stages
                yield (
                    (name, count),
                    SamplingPlan(
                        model, steps=steps, solver=name, guidance_scale=scale, time_grid=grid
                    ),
                )


def samples(
    plans: dict[tuple[str, int], SamplingPlan],
    reference: SamplingPlan,
    batches: list[Batch],
    training: EmbeddingDataset,
    seed: int,
) -> list[dict[str, Any]]:
    """How good and how varied the samples of each solver are."""
    mean = MeanPredictor.fit(
        read_batches(training, chosen(training, 800), 32, reference.model.device, None)
    ).mean

    def drawn(sampler: SamplingPlan, seed: int) -> list[Tensor]:
        return [
            sampler(batch.eva.float(), seeds=[sample_seed(key, seed) for key in batch.keys])
            for batch in batches
        ]

    others = drawn(reference, seed + OTHER_NOISE)
    shown = {("reference", 0): reference}
    shown |= {key: p for key, p in plans.items() if key[0] in ("fitted", "heun")}
    rows = []
    for (name, count), sampler in shown.items():
        true, dense = (MetricAccumulator(mean, has_cls=training.has_cls) for _ in range(2))
        for batch, x, other in zip(batches, drawn(sampler, seed), others, strict=True):
            true.add(x, batch.clip.float(), batch.keys, batch.sources)
            dense.add(x, other, batch.keys, batch.sources)
        to_true, to_dense = true.finish(bootstrap=0), dense.finish(bootstrap=0)
        rows.append(
            {
                "solver": name,
                "evaluations": count,
                "token_cosine": to_true.token_cosine.value,
                "recall_at_1": to_true.recall_generated_to_target[1].value,
                "variance_ratio": to_dense.variance_ratio.value,
                "energy_distance": to_dense.energy_distance,
            }
        )
    return rows


def dtypes(
    model: BLIP3oDiT,
    fitted: dict[int, FittedSolver],
    reference: SamplingPlan,
    eva: Tensor,
    seed: int,
) -> list[dict[str, Any]]:
    """Errors against the fp32 reference when other dtypes evaluate the network."""
    emulated = e4m3_refusal(eva.device) is not None
    choices: dict[str, dict[str, Any]] = {
        "fp32": {},
        "bf16": {"dtype": torch.bfloat16},
        "fp8": {"dtype": torch.float8_e4m3fn, "impl": Impl.REFERENCE if emulated else None},
    }
    plans = {
        (name, count): plan(model, solver, **options)
        for name, options in choices.items()
        for count, solver in fitted.items()
    }
    errors = solver_errors(plans, reference, eva, torch.Generator().manual_seed(seed + 2))
    return [
        {"evaluations": count, **{name: errors[name, count] for name in choices}}
        for count in fitted
    ]


def transfer(
    model: BLIP3oDiT,
    fitted: dict[int, FittedSolver],
    known: Tensor,
    unseen: Tensor,
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Errors where the solver was not fitted."""
    generator = torch.Generator().manual_seed(args.seed + 3)
    noise = torch.randn(unseen.shape, generator=generator).to(unseen)
    channels = known.flatten(0, 1)
    no_image = channels.mean(0) + channels.std(0) * noise
    scale = next(iter(fitted.values())).guidance_scale
    other = {n: replace(solver, guidance_scale=scale + 0.5) for n, solver in fitted.items()}
    cases = (
        ("conditions that are no image", fitted, no_image, scale),
        (f"guidance {scale + 0.5:g} instead of {scale:g}", other, unseen, scale + 0.5),
    )
    rows = []
    for name, solvers, eva, weight in cases:
        if weight != 1.0 and not model.config.condition_dropout:
            continue
        plans = {n: plan(model, solver) for n, solver in solvers.items()}
        reference = default_reference(model, weight, args.time_grid)
        errors = solver_errors(plans, reference, eva, generator)
        rows.append({"case": name, "errors": errors})
    return rows


if __name__ == "__main__":
    main()
