"""``blip3o-fast fit-solver``: solvers of few evaluations for a model, beside its checkpoint."""

import argparse
from pathlib import Path

import torch

from blip3o_fast.checkpoint import SOLVER_NAME, locate_checkpoint
from blip3o_fast.data import EmbeddingDataset
from blip3o_fast.devices import DTYPES, find_device
from blip3o_fast.errors import OptionError
from blip3o_fast.flags import given
from blip3o_fast.flow import FittedSolver, save_solvers
from blip3o_fast.model_card import refresh_solvers
from blip3o_fast.options.fit_solver import FitOptions
from blip3o_fast.pretrained import BLIP3oDiT, load_trained_model
from blip3o_fast.report.columns import align
from blip3o_fast.sampling import SamplingPlan, fit_solvers
from blip3o_fast.sampling.fit import default_reference, solver_errors

PEERS = ("heun", "adams_bashforth2", "adams_bashforth4")


def run(args: argparse.Namespace) -> int:
    """Fit, write ``solver.json``, print the errors beside those of other solvers."""
    options = FitOptions(**given(FitOptions, args))
    device = find_device(options.device)
    model = load_trained_model(
        Path(options.model_path),
        num_attention_heads=options.num_attention_heads,
        num_key_value_heads=options.num_key_value_heads,
        device=device,
    )
    eva = conditions(options, model).to(device)
    dtype = None if options.dtype is None else DTYPES[options.dtype]
    generator = torch.Generator().manual_seed(options.seed)
    try:
        fitted = fit_solvers(
            model,
            eva,
            evaluations=options.evaluations,
            guidance_scale=options.guidance_scale,
            generator=generator,
            dtype=dtype,
            progress=options.progress,
        )
    except ValueError as error:
        raise OptionError(str(error)) from None
    found = locate_checkpoint(Path(options.model_path))
    folder = found if found.is_dir() else found.parent
    solvers = {**model.fitted, **fitted}
    # Before the table, which takes minutes of its own.
    save_solvers(folder, solvers)
    refresh_solvers(folder, solvers)
    held_out = eva[-max(1, len(eva) // 4) :]
    print("\n".join(table(model, fitted, held_out, generator, dtype, options.progress)))
    print(f"\nSolvers: {folder / SOLVER_NAME}")
    return 0


def conditions(options: FitOptions, model: BLIP3oDiT) -> torch.Tensor:
    """EVA tokens ``[n, N, E]`` drawn from the shards, in the dtype of the model."""
    data = EmbeddingDataset(options.embeddings_dir, split="train", tokens=model.config.num_tokens)
    if data.eva_width != model.config.eva_embedding_size:
        raise OptionError(
            f"embeddings_dir: expected EVA width {model.config.eva_embedding_size}, that of the "
            f"model, got {data.eva_width}"
        )
    if len(data) < options.conditions:
        raise OptionError(
            f"conditions: expected at most the {len(data)} training samples of "
            f"{options.embeddings_dir}, got {options.conditions}; pass --conditions {len(data)}"
        )
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(options.seed))
    return data.read(order[: options.conditions].tolist()).eva.to(model.dtype)


def table(
    model: BLIP3oDiT,
    fitted: dict[int, FittedSolver],
    eva: torch.Tensor,
    generator: torch.Generator,
    dtype: torch.dtype | None,
    progress: bool,
) -> list[str]:
    """Relative errors of final states on conditions that no solver was fitted to."""
    scale = next(iter(fitted.values())).guidance_scale
    plans = {}
    for count, solver in fitted.items():
        for name in ("fitted", *PEERS):
            stages = 2 if name == "heun" else 1
            if count % stages:
                continue
            plans[count, name] = SamplingPlan(
                model,
                steps=count // stages,
                solver=solver if name == "fitted" else name,
                guidance_scale=scale,
                dtype=dtype,
            )
    errors = solver_errors(plans, default_reference(model, scale), eva, generator, progress)
    rows = [["evaluations", "fitted", *PEERS]]
    for count in fitted:
        found = (errors.get((count, name)) for name in ("fitted", *PEERS))
        rows.append([str(count), *("" if e is None else f"{e:.2g}" for e in found)])
    return align(rows)
