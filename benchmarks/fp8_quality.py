"""The accuracy of FP8 and bf16 beside fp32, on held-out samples.

    python benchmarks/fp8_quality.py --model_path demo/run --embeddings_dir demo/shards

Each dtype translates the same samples from the same noise. Three figures: the relative distance of
a velocity from that of fp32, at states between noise and target; the token cosine between final
samples and those of fp32; and the token cosine between final samples and targets. FP8 runs on the
tensor cores of a GPU that can multiply it. Elsewhere it is emulated: the same e4m3 numbers, their
products summed in fp32. Prints a table, and one line of JSON at the end.
"""

import argparse
import json
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from blip3o_fast import BLIP3oDiT, SamplingPlan, load_trained_model
from blip3o_fast.benchmarking.environment import describe_environment
from blip3o_fast.data import Batch, EmbeddingDataset
from blip3o_fast.evaluation.evaluate import (
    EvaluationSettings,
    check_fit,
    chosen,
    read_batches,
)
from blip3o_fast.evaluation.metrics import token_cosines
from blip3o_fast.flow import draw_noise, interpolate
from blip3o_fast.ops import Impl, e4m3_refusal
from blip3o_fast.seeds import sample_seed

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--model_path", required=True, help="checkpoint folder or training run")
    add("--embeddings_dir", required=True, help="shards with a held-out side")
    add("--max_samples", type=int, default=32, help="held-out samples, evenly spread")
    add("--batch_size", type=int, default=16, help="samples at once")
    add("--evaluations", type=int, nargs="+", default=[1, 4, 20], help="network evaluations")
    add("--times", type=float, nargs="+", default=[0.1, 0.5, 0.9], help="of the velocities")
    add("--seed", type=int, default=0, help="with a sample's key, decides its noise")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device")
    args = parser.parse_args()
    device = torch.device(args.device)
    model = load_trained_model(args.model_path, device=device).float()
    heldout = EmbeddingDataset(args.embeddings_dir, split="heldout")
    check_fit(model, heldout)
    indices = chosen(heldout, args.max_samples)
    parts = list(read_batches(heldout, indices, args.batch_size, device, None))
    emulated = e4m3_refusal(device)
    rows = [
        *velocity_errors(model, parts, args.times, args.seed, emulated is not None),
        *sample_cosines(model, parts, args.evaluations, args.seed, emulated is not None),
    ]
    print(table(rows))
    facts = {
        "benchmark": "fp8_quality",
        "environment": describe_environment(device),
        "fp8": "hardware" if emulated is None else f"emulation ({emulated})",
        "parameters": model.get_num_parameters(),
        "samples": len(indices),
        "sources": len({source for batch in parts for source in batch.sources}),
        "rows": rows,
    }
    print(json.dumps(facts))


def implementation(dtype: str, emulated: bool) -> Impl | None:
    """The reference emulates FP8; None for all else."""
    return Impl.REFERENCE if dtype == "fp8" and emulated else None


def noise_of(batch: Batch, seed: int) -> Tensor:
    """The noise that ``generate`` draws for each sample."""
    seeds = [sample_seed(key, seed) for key in batch.keys]
    return draw_noise(batch.clip.shape, device=batch.clip.device, seeds=seeds)


@torch.no_grad()
def velocity_errors(
    model: BLIP3oDiT, parts: list[Batch], times: list[float], seed: int, emulated: bool
) -> list[dict[str, Any]]:
    """``|v - v_fp32| / |v_fp32|`` over all samples, at states on the way to their targets."""
    rows: list[dict[str, Any]] = []
    for time in times:
        squares = dict.fromkeys(DTYPES, 0.0)
        for batch in parts:
            noise = noise_of(batch, seed)
            target = batch.clip.float() * model.config.simple_scale_factor
            state = interpolate(target, noise, noise.new_full((len(noise),), time))
            found = {
                name: velocity(model, dtype, implementation(name, emulated), batch, state, time)
                for name, dtype in DTYPES.items()
            }
            for name, v in found.items():
                apart = v if name == "fp32" else v - found["fp32"]
                squares[name] += apart.square().sum().item()
        row: dict[str, Any] = {"measure": "velocity error", "at": time}
        rows.append(row | {n: (squares[n] / squares["fp32"]) ** 0.5 for n in ("bf16", "fp8")})
    return rows


def velocity(
    model: BLIP3oDiT,
    dtype: torch.dtype,
    impl: Impl | None,
    batch: Batch,
    state: Tensor,
    time: float,
) -> Tensor:
    """One evaluation of a sampling plan, fp32."""
    times = sorted({0.0, time, 1.0})
    plan = SamplingPlan(
        model, steps=len(times) - 1, solver="euler", time_grid=times, dtype=dtype, impl=impl
    )
    trajectory = plan.start(batch.eva.float(), state)
    trajectory.row.fill_(times.index(time))
    return trajectory.slope().float()


def sample_cosines(
    model: BLIP3oDiT, parts: list[Batch], evaluations: list[int], seed: int, emulated: bool
) -> list[dict[str, Any]]:
    """Mean token cosine of the final samples to those of fp32, and to the targets."""
    settings = EvaluationSettings(evaluations=tuple(evaluations))
    rows: list[dict[str, Any]] = []
    for count in settings.evaluations:
        solver, steps = settings.method(count)
        to_fp32: dict[str, list[Tensor]] = {name: [] for name in DTYPES}
        to_target: dict[str, list[Tensor]] = {name: [] for name in DTYPES}
        for batch in parts:
            noise = noise_of(batch, seed)
            exact: Tensor | None = None
            for name, dtype in DTYPES.items():
                plan = SamplingPlan(
                    model,
                    steps=steps,
                    solver=solver,
                    dtype=dtype,
                    impl=implementation(name, emulated),
                )
                clip = plan(batch.eva.float(), noise)
                exact = clip if exact is None else exact
                to_fp32[name].append(F.cosine_similarity(clip, exact, dim=-1).double().mean(1))
                to_target[name].append(token_cosines(clip, batch.clip.float()).double().mean(1))
        for measure, found in (("cosine to fp32", to_fp32), ("cosine to target", to_target)):
            means = {name: torch.cat(values).mean().item() for name, values in found.items()}
            rows.append({"measure": measure, "at": count} | means)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; a velocity is at a time, samples are of so many network evaluations."""
    lines = ["| measure | fp32 | bf16 | fp8 |", "|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: row["measure"], reverse=True):
        error = row["measure"] == "velocity error"
        at = f"t = {row['at']:g}" if error else f"{row['at']} evaluations"
        shown = [f"{row[n]:.2%}" if error else f"{row[n]:.5f}" for n in ("bf16", "fp8")]
        first = "0" if error else f"{row['fp32']:.5f}"
        lines.append(f"| {row['measure']}, {at} | {' | '.join((first, *shown))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
