"""A batch translated on a CPU: the published 100 evaluations, ours, and five of a fitted solver.

    python benchmarks/published_sampling.py --published CHECKOUT --json OUT.json

CHECKOUT is as for ``published_cpu.py``. All competitors have the same random weights of base, start
from the same noise, and take their turns in every round; the seconds are medians. Errors are
relative distances of the final state from that of the published ``generate``, on conditions that
the solver was not fitted to. The weights are random and so is the field that they make:
``fitted_solvers.py`` has the errors of trained models.
"""

import argparse
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from published_cpu import CLIP, EVA, TOKENS, autocast, build_published
from result_tables import show
from torch import Tensor

from blip3o_fast import SamplingPlan, accelerate, fit_solver
from blip3o_fast.atomic import write_atomically, write_json
from blip3o_fast.benchmarking.environment import describe_environment
from blip3o_fast.report.style import LIGHT, decimal_axis, new_figure, png, style_axes

STEPS = 50  # of Heun's method: the published default
SEED = 0


def main() -> int:
    """Fit, time, compare, and write JSON and a picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--published", required=True, help="checkout of the published repository")
    add("--batch", type=int, default=2, help="samples")
    add("--rounds", type=int, default=2, help="turns of each competitor")
    add("--conditions", type=int, default=12, help="samples to fit on")
    add("--evaluations", type=int, default=5, help="of the fitted solver")
    add("--threads", type=int, default=os.cpu_count(), help="threads of torch")
    add("--layers", type=int, default=12, help="blocks; base has 12")
    add("--json", required=True, help="where to write the figures; a PNG goes beside them")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    published: Any = build_published(Path(args.published), args.layers)
    model = accelerate(published)
    known = torch.randn(args.conditions, TOKENS, EVA)
    eva = torch.randn(args.batch, TOKENS, EVA)
    noise = torch.randn(args.batch, TOKENS, CLIP, generator=seeded())

    before, started = peak_bytes(), time.perf_counter()
    solver = fit_solver(model, known, evaluations=args.evaluations, generator=seeded())
    fit = {"seconds": time.perf_counter() - started, "bytes": peak_bytes() - before}

    def theirs() -> Tensor:
        with torch.no_grad():
            return published.generate(eva, STEPS, generator=seeded())

    plans = {
        "ours, fp32, 100 evaluations": SamplingPlan(model, steps=STEPS),
        f"ours, fp32, fitted {args.evaluations}": SamplingPlan(model, solver=solver),
        "ours, bf16, 100 evaluations": SamplingPlan(model, steps=STEPS, dtype=torch.bfloat16),
        f"ours, bf16, fitted {args.evaluations}": SamplingPlan(
            model, solver=solver, dtype=torch.bfloat16
        ),
    }
    competitors: dict[str, Callable[[], Tensor]] = {
        "published, fp32, 100 evaluations": theirs,
        "published autocast, bf16, 100 evaluations": autocast(theirs),
        **{name: lambda plan=plan: plan(eva, noise) for name, plan in plans.items()},
    }
    times: dict[str, list[float]] = {name: [] for name in competitors}
    results: dict[str, Tensor] = {}
    for name, plan in plans.items():
        results[name] = plan(eva[:1], noise[:1])  # packs the weights
    for _ in range(args.rounds):
        for name, run in competitors.items():
            started = time.perf_counter()
            results[name] = run()
            times[name].append(time.perf_counter() - started)
            print(f"{name}: {times[name][-1]:.2f} s", flush=True)
    seconds = {name: median(taken) for name, taken in times.items()}
    first = next(iter(competitors))
    exact = results[first]
    facts = {
        "benchmark": "published_sampling",
        "environment": describe_environment(torch.device("cpu")),
        "batch": args.batch,
        "layers": args.layers,
        "rounds": args.rounds,
        "seconds": seconds,
        "ratio": {name: seconds[first] / value for name, value in seconds.items()},
        "error": {name: float((x - exact).norm() / exact.norm()) for name, x in results.items()},
        "fit": fit | {"conditions": args.conditions, "held_out_error": solver.error},
    }
    path = Path(args.json)
    write_json(path, facts)
    write_atomically(path.with_suffix(".png"), draw(facts))
    print(show(facts))
    return 0


def draw(facts: dict[str, Any]) -> bytes:
    """A PNG: seconds of a batch, with ratio and error."""
    figure = new_figure(7.5, 2.8)
    axes = figure.subplots()
    names = list(facts["seconds"])
    seconds = [facts["seconds"][name] for name in names]
    colours = [LIGHT.grey if name.startswith("published") else LIGHT.series[0] for name in names]
    axes.barh(names, seconds, color=colours)
    for place, name in enumerate(names):
        text = f" {seconds[place]:.3g} s, {facts['ratio'][name]:.3g}x"
        if facts["error"][name]:
            text += f", error {facts['error'][name]:.1e}"
        axes.text(seconds[place], place, text, va="center", color=LIGHT.text, fontsize=9)
    axes.invert_yaxis()
    axes.set(xscale="log", xlim=(min(seconds) / 2, max(seconds) * 40))
    axes.set_xlabel(f"seconds for a batch of {facts['batch']} on {facts['environment']['device']}")
    style_axes(axes)
    axes.grid(False)
    decimal_axis(axes.xaxis)
    return png(figure)


def seeded() -> torch.Generator:
    """The same noise for all."""
    return torch.Generator().manual_seed(SEED + 1)


def peak_bytes() -> int:
    """The most memory that the process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main())
