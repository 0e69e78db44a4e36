"""First contact with a device: checks that each thing works at all, one line for each check.

    python benchmarks/smoke.py [models triton cuda ...] [--device cuda] [--json smoke.json]

``models`` are an evaluation, the same as a CUDA graph, a training step and an FP8 product. All
other words are implementations: each of their kernels is called once and compared with the
reference in fp64.

Checks run in another process; this one writes the record after each. A check may end its process,
break the device for it (after an illegal access nothing more runs there) or not answer. The checks
after it then run in a new process.

Exit status: 0 if all that is here is good, ``BROKE`` if a check ended its process, else 1.
"""

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import every_op
import torch
from every_op import ALLOWED, Unavailable

from blip3o_fast import ops
from blip3o_fast.atomic import write_json
from blip3o_fast.benchmarking.cases import Disagreement, check_agreement
from blip3o_fast.benchmarking.environment import describe_commit
from blip3o_fast.benchmarking.network_cases import Network, hoisted
from blip3o_fast.benchmarking.shapes import Shape
from blip3o_fast.benchmarking.suite import explain
from blip3o_fast.benchmarking.training_cases import Training, prepare_step
from blip3o_fast.config import PRESETS, Size
from blip3o_fast.ops import Impl
from blip3o_fast.reference import quantise_rows
from blip3o_fast.sampling import SamplingPlan

KIND = "blip3o-fast smoke"
FORMAT = 1
MODELS = "models"
BROKE = 3
GRAPHED_STEPS = 3

Verdict = Literal["good", "wrong", "failed", "broke", "not here"]
Check = Callable[[], str]
"""Returns a line of detail; raises ``Disagreement`` if wrong, ``Unavailable`` if not here."""


@dataclass(frozen=True)
class Answer:
    """The result of a check.

    ``wrong`` is a result that differs. ``failed`` is an error. ``broke`` is an error that ended its
    process or broke the device for it.
    """

    name: str
    verdict: Verdict
    seconds: float
    detail: str


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    what: tuple[str, ...]
    device: str
    preset: Size
    ops: tuple[str, ...]
    patience: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every check, print a line and write the record after each."""
    options, path = parse_arguments(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("expected a GPU that torch can use, found none; --device cpu tests this without one")
        return 1
    names = list(checks(options))
    answers: list[Answer] = []
    for answer in ask(options, names):
        answers.append(answer)
        print(f"{answer.name}: {answer.verdict}: {answer.detail}", flush=True)
        if path is not None:
            write_json(path, describe(answers, len(names)))
    verdicts = [answer.verdict for answer in answers]
    print(", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(sorted(verdicts))))
    if "broke" in verdicts:
        return BROKE
    return int("wrong" in verdicts or "failed" in verdicts)


def parse_arguments(arguments: Sequence[str] | None) -> tuple[Options, Path | None]:
    """Options, and where the record goes."""
    kinds = (MODELS, *(impl.value for impl in Impl))
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", nargs="*", help=f"of {', '.join(kinds)}; default: all")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--preset", default="base", choices=tuple(PRESETS), help="of the models")
    parser.add_argument("--ops", nargs="+", help="whose kernels are called; default: all")
    parser.add_argument("--patience", type=float, default=30.0,
        help="seconds in which a check must answer, the start of its process included")  # fmt: skip
    parser.add_argument("--json", type=Path, help="where to write the record")
    args = parser.parse_args(arguments)
    if unknown := [word for word in args.what if word not in kinds]:
        parser.error(f"expected some of {', '.join(kinds)}, got {unknown[0]}")
    found = tuple(ops.OPS)
    if unknown := [name for name in args.ops or () if name not in found]:
        parser.error(f"--ops: expected some of {', '.join(found)}, got {unknown[0]}")
    what, chosen = tuple(args.what or kinds), tuple(args.ops or found)
    return Options(what, args.device, args.preset, chosen, args.patience), args.json


def describe(answers: Sequence[Answer], count: int) -> dict[str, Any]:
    """The record so far, of ``count`` checks."""
    return {
        "kind": KIND,
        "format": FORMAT,
        "commit": describe_commit()[0],
        "of": count,
        "checks": [asdict(answer) for answer in answers],
    }


def ask(options: Options, names: Sequence[str]) -> Iterator[Answer]:
    """The answers of all checks in order. After a check that broke, a new process goes on."""
    context = multiprocessing.get_context("spawn")
    done = 0
    while done < len(names):
        ours, theirs = context.Pipe()
        process = context.Process(target=answer, args=(theirs, options, names[done:]), daemon=True)
        process.start()
        theirs.close()
        useful = True
        while useful and done < len(names):
            started = time.monotonic()
            try:
                late = f"no answer in {options.patience:g} s"
                found = ours.recv() if ours.poll(options.patience) else late
            except EOFError:
                process.join()
                found = f"its process ended with exit status {process.exitcode}"
            if isinstance(found, str):
                found = Answer(names[done], "broke", time.monotonic() - started, found)
            useful = found.verdict != "broke"
            done += 1
            yield found
        if not useful:
            process.kill()
        process.join()


def answer(connection: Connection, options: Options, names: Sequence[str]) -> None:
    """Run checks one after another, and send what each found."""
    made = checks(options)
    for name in names:
        started = time.monotonic()
        verdict, detail = judge(made[name], torch.device(options.device))
        connection.send(Answer(name, verdict, round(time.monotonic() - started, 2), detail))


def judge(check: Check, device: torch.device) -> tuple[Verdict, str]:
    """Run a check to its end on the device."""
    verdict: Verdict = "good"
    detail = ""
    try:
        detail = check()
    except Unavailable as error:
        verdict, detail = "not here", str(error)
    except Disagreement as error:
        verdict, detail = "wrong", str(error)
    except Exception as error:
        verdict, detail = "failed", explain(error)
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            return "broke", detail or explain(error)
    return verdict, detail


def checks(options: Options) -> dict[str, Check]:
    """Every check by name. None has used the device yet."""
    device = torch.device(options.device)
    found: dict[str, Check] = {}
    if MODELS in options.what:
        dtype = "bf16" if device.type == "cuda" else "fp32"
        network = Network(Shape(options.preset), dtype, device)
        training = Training(Shape(options.preset, 2), dtype, device)
        found["one evaluation"] = partial(evaluate, network)
        found["capture and replay"] = partial(replay, network)
        found["one training step"] = partial(train, training)
        found["one FP8 product"] = partial(multiply, device)
    for impl in Impl:
        if impl.value not in options.what:
            continue
        for op in options.ops:
            for dtype in ALLOWED:
                name = f"{op}, {dtype}, {impl.value}"
                found[name] = partial(call, ops.OPS[op], dtype, device, impl)
    return found


def evaluate(network: Network) -> str:
    """The plan's evaluation beside the model's own, by the reference."""
    hoisted(network, None)
    return f"agrees with the reference, {network.shape.name}"


def replay(network: Network) -> str:
    """A translation by replays beside one by launches; the first replay is compared bit by bit."""
    if network.device.type != "cuda":
        raise Unavailable(f"expected a GPU, got {network.device}")
    model, x, eva = network.get()
    replayed, launched = (
        SamplingPlan(model, steps=GRAPHED_STEPS, dtype=network.dtype, graph=graph)(eva, noise=x)
        for graph in (True, False)
    )
    check_agreement("the captured step", replayed, launched)
    return f"{GRAPHED_STEPS} steps agree with those launched one by one"


def train(training: Training) -> str:
    """Two optimizer steps: the second on weights that the first changed."""
    trainer, _ = training.get()
    before = [p.detach().clone() for p in trainer.model.parameters()]
    (step,) = prepare_step(training).calls
    for _ in range(2):
        numbers = step()
        assert isinstance(numbers, torch.Tensor)
        if not numbers.isfinite().all():
            raise Disagreement(f"expected finite losses and norms, got {numbers.tolist()}")
    after = list(trainer.model.parameters())
    moved = sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    if not all(p.isfinite().all() for p in after) or not moved:
        raise Disagreement(f"expected finite weights that moved, {moved} of {len(after)} did")
    return f"{moved} of {len(after)} parameters moved"


def multiply(device: torch.device) -> str:
    """An FP8 product of rows with their own scales, also at the smallest inner width."""
    if (refusal := ops.e4m3_refusal(device)) is not None:
        raise Unavailable(refusal)
    for inner in (16, 768):
        torch.manual_seed(0)
        x, weight = (torch.randn(rows, inner).bfloat16() for rows in (48, 32))
        exact = ops.scaled_linear(quantise_rows(x), quantise_rows(weight), impl=Impl.REFERENCE)
        quantised = [quantise_rows(t.to(device)) for t in (x, weight)]
        check_agreement(
            f"a product of inner width {inner}", ops.scaled_linear(*quantised).cpu(), exact
        )
    return "agrees with the emulation at inner widths 16 and 768"


def call(op: ops.Op, dtype: str, device: torch.device, impl: Impl) -> str:
    """An op by one implementation, with its gradients."""
    distance, allowed = every_op.worst_distance(op, dtype, device, impl), ALLOWED[dtype]
    if distance > allowed:
        raise Disagreement(f"expected fp64 up to {allowed:g} (relative), got {distance:.2g}")
    return f"{distance:.1e} of {allowed:g}"


if __name__ == "__main__":
    sys.exit(main())
