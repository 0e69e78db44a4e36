"""One evaluation of base on a CPU: the published implementation beside this library.

    python benchmarks/published_cpu.py --published CHECKOUT

CHECKOUT is a clone of github.com/Hafeezmhk7/eva-clip-v2_4 at commit cc03ace. Every competitor has
the same random weights, 256 tokens and batch 1, and takes its turn in every round; the table shows
medians, and beside them the fastest, which a busy machine spoils less. The plan's time is that of
an Euler step inside ``generate``: evaluation and state update.

The limit is the time that the evaluation's GEMMs and attention products take alone, in the same
run. The last line is JSON.
"""

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from result_tables import show
from torch import Tensor, nn

from blip3o_fast import SamplingPlan, accelerate
from blip3o_fast.benchmarking.checkout import check_checkout, load_published
from blip3o_fast.benchmarking.environment import describe_environment
from blip3o_fast.benchmarking.shapes import Shape
from blip3o_fast.errors import OptionError

TOKENS, EVA, CLIP = 256, 4096, 1024
Result = TypeVar("Result")
Timer = Callable[[], list[float]]
"""Takes one turn and returns the seconds of each evaluation in it."""


def main() -> int:
    """Time, print a table, and end with one line of JSON."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    published = build_published(Path(args.published), args.layers)
    model = accelerate(published)
    eva, x = torch.randn(1, TOKENS, EVA), torch.randn(1, TOKENS, CLIP)
    t = torch.full((1,), 0.5)
    competitors: dict[str, Timer] = {
        "published, fp32": one(lambda: published(x, t, eva, return_dict=False)),
        "published autocast, bf16": one(autocast(lambda: published(x, t, eva, return_dict=False))),
        "plain model, fp32": one(lambda: model(x, t, eva, return_dict=False)),
        "GEMM limit, fp32": one(limit(torch.float32, args.layers)),
        "plan, fp32": steps(SamplingPlan(model, steps=args.steps, solver="euler"), eva, x),
        "GEMM limit, bf16": one(limit(torch.bfloat16, args.layers)),
        "plan, bf16": steps(plan_bf16(model, args.steps), eva, x),
    }
    if args.compile:
        compiled = torch.compile(model)
        competitors["plain model compiled, fp32"] = one(
            lambda: compiled(x, t, eva, return_dict=False)
        )
        competitors["plan compiled, fp32"] = steps(
            SamplingPlan(model, steps=args.steps, solver="euler", compile=True), eva, x
        )
        competitors["plan compiled, bf16"] = steps(plan_bf16(model, args.steps, True), eva, x)
    seconds = race(competitors, args.rounds)
    report(seconds, agreement(published, model, x, t, eva), args)
    return 0


def parse_arguments() -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--published", required=True, help="checkout of the published repository")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each competitor")
    parser.add_argument("--steps", type=int, default=3, help="Euler steps in a plan's turn")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch")
    parser.add_argument("--layers", type=int, default=12, help="blocks; base has 12")
    parser.add_argument("--compile", action="store_true", help="also time torch.compile (slow)")
    return parser.parse_args()


def build_published(checkout: Path, layers: int) -> nn.Module:
    """The published base with so many blocks."""
    try:
        return load_published(check_checkout(checkout), Shape("base"), num_hidden_layers=layers)
    except OptionError as error:
        raise SystemExit(f"--{error}") from None


def plan_bf16(model: Any, count: int, compiled: bool = False) -> SamplingPlan:
    """An Euler plan in bf16."""
    return SamplingPlan(model, steps=count, solver="euler", dtype=torch.bfloat16, compile=compiled)


def one(function: Callable[[], object]) -> Timer:
    """A turn of one call."""

    def turn() -> list[float]:
        with torch.no_grad():
            start = time.perf_counter()
            function()
            return [time.perf_counter() - start]

    return turn


def autocast(function: Callable[[], Result]) -> Callable[[], Result]:
    """``function`` in bf16 as the published model can run it: its parameters stay fp32."""

    def call() -> Result:
        with torch.autocast("cpu", torch.bfloat16):
            return function()

    return call


def steps(plan: SamplingPlan, eva: Tensor, x: Tensor) -> Timer:
    """A turn of one ``generate``: the time from step to step, without preparation."""

    def turn() -> list[float]:
        stamps: list[float] = []
        plan(eva, noise=x, callback=lambda *_: stamps.append(time.perf_counter()))
        return [b - a for a, b in itertools.pairwise(stamps)]

    return turn


def limit(dtype: torch.dtype, layers: int) -> Callable[[], None]:
    """The matrix products of one evaluation of base, weights read from memory as in the model."""
    D, H, K, d, inner = 768, 12, 4, 64, 2048
    shapes = [((H + 2 * K) * d, D), (D, D), (D, D), (D, D), (2 * inner, D), (D, inner)]
    weights = [torch.randn(shape).to(dtype) for _ in range(layers) for shape in shapes]
    rows = {width: torch.randn(TOKENS, width).to(dtype) for width in (D, inner, CLIP)}
    ends = [torch.randn(D, CLIP).to(dtype), torch.randn(CLIP, D).to(dtype)]
    q = torch.randn(H, TOKENS, d).to(dtype)
    logits = torch.randn(H, TOKENS, TOKENS).to(dtype)

    def products() -> None:
        for weight in (*weights, *ends):
            F.linear(rows[weight.shape[1]], weight)
        for _ in range(2 * layers):
            q @ q.transpose(1, 2)
            logits @ q

    return products


def race(competitors: dict[str, Timer], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, round by round, after one untimed turn."""
    for turn in competitors.values():
        turn()
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    for _ in range(rounds):
        for name, turn in competitors.items():
            seconds[name] += turn()
    return seconds


@torch.no_grad()
def agreement(published: nn.Module, model: nn.Module, x: Tensor, t: Tensor, eva: Tensor) -> float:
    """Relative difference between the two implementations."""
    theirs = published(x, t, eva, return_dict=False)
    ours = model(x, t, eva, return_dict=False)
    return float((ours - theirs).norm() / theirs.norm())


def report(times: dict[str, list[float]], difference: float, args: argparse.Namespace) -> None:
    """Print a table, then JSON."""
    seconds = {name: median(taken) for name, taken in times.items()}
    fastest = {name: min(taken) for name, taken in times.items()}
    base = seconds["published, fp32"]
    facts = {
        "benchmark": "published_cpu",
        "environment": describe_environment(torch.device("cpu")),
        "seconds": seconds,
        "fastest": fastest,
        "ratio": {name: base / value for name, value in seconds.items()},
        "difference": difference,
        "rounds": args.rounds,
        "layers": args.layers,
    }
    print(show(facts))
    print(json.dumps(facts))


if __name__ == "__main__":
    sys.exit(main())
