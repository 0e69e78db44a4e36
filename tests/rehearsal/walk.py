"""Prepares and calls all that ``bench`` would on a GPU, on one that is not there.

``python -m tests.rehearsal.walk`` prints a line of JSON for each thing that was walked; see
``gpu.start``. To take seconds all batches are ``BATCH``, and translations take ``STEPS`` steps:
nothing but sizes and repetitions depends on either.
"""

import importlib
import io
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from blip3o_fast.benchmarking import selection, suite
from blip3o_fast.benchmarking.cases import Case, Contender
from blip3o_fast.benchmarking.ceilings import Ceilings
from blip3o_fast.benchmarking.clock import Timing
from blip3o_fast.benchmarking.op_cases import op_cases
from blip3o_fast.benchmarking.record_text import render_record
from blip3o_fast.benchmarking.shapes import Shape
from blip3o_fast.ops import OPS, Impl, _cuda
from blip3o_fast.ops._registration import bind
from tests.modules import MODELS, tensors_of
from tests.rehearsal.gpu import FakeGpu, Record

BATCH = 16
STEPS = 2
PREDICTED, SECONDS, BANDWIDTH = Shape("base", 64), 1e-4, 3e12
GPU = torch.device("cuda")


def main() -> None:
    """Walk everything."""
    pretend_cuda_build()
    pretend_compiler()
    gpu = FakeGpu()
    with gpu.present():
        for name, make in MODELS.items():
            with GPU:
                model = make()
            devices = {x.device.type for _, x in tensors_of(model)}
            say(walked="module", name=name, devices=sorted(devices))
        for name, bait in BAITS.items():
            with gpu.recording() as record:
                bait(torch.ones(3, device=GPU))
            say(walked="bait", name=name, waits=record.waits)
        say(walked="script", name="every_op", lines=script("every_op"))
        say(walked="bench", **bench())
        for case in cases():
            for contender in case.contenders:
                say(walked="contender", **walk(gpu, case, contender))


def bench() -> dict[str, Any]:
    """What ``bench`` makes of the ops of one shape, were each call to take ``SECONDS``."""
    timing = Timing(SECONDS, SECONDS, SECONDS, 1, None, None, None)
    suite.time_together = lambda watches, budget: [timing for _ in watches]
    suite.measure_ceilings = lambda *_, **__: Ceilings(BANDWIDTH, {"bf16": 8e14}, 5e10)
    source = partial(op_cases, PREDICTED, "bf16", GPU, compiled=False)
    suite.choose_sources = lambda settings: [("ops", source)]
    record = suite.run_suite(selection.Settings(GPU, quick=True, groups=("ops",)))
    measurements = [asdict(m) | {"fraction": m.fraction} for m in record.measurements]
    text = render_record(record).splitlines()
    return {"measurements": measurements, "failures": record.failures, "text": text}


def cases() -> Iterator[Case]:
    """Those of a whole run on a GPU; each contender once, or once a shape where that is quick."""
    selection.Shape = lambda preset, batch=1, tokens=256: Shape(preset, BATCH, tokens)
    for shapes in ("SHAPES", "LARGE_SHAPES"):
        smaller = tuple(Shape(shape.preset, BATCH) for shape in getattr(selection, shapes))
        setattr(selection, shapes, smaller)
    generate_cases = selection.generate_cases
    selection.generate_cases = lambda *args, **options: generate_cases(
        *args, **{**options, "steps": STEPS}
    )
    seen = set()
    sources = selection.choose_sources(selection.Settings(GPU))
    for case in (case for _, make in sources for case in make()):
        task = case.task
        shape = task.shape if task.group in ("ops", "attention") else ""
        new = {(task.group, task.name, shape, c.name): c for c in case.contenders}
        new = {key: contender for key, contender in new.items() if key not in seen}
        seen |= set(new)
        if new:
            yield Case(task, tuple(new.values()))


def walk(gpu: FakeGpu, case: Case, contender: Contender) -> dict[str, Any]:
    """Prepare a contender; if it is ours, make all its calls, and one more that is recorded."""
    task = case.task
    gpu.captures.clear()
    error, record = None, Record()
    try:
        prepared = contender.prepare()
        try:
            if contender.ours:
                for call in prepared.calls:
                    call()
                with gpu.recording() as record:
                    prepared.calls[0]()
        finally:
            if prepared.close is not None:
                prepared.close()
    except Exception:
        error = traceback.format_exc()
    return {
        "group": task.group,
        "task": f"{task.name}, {task.shape}, {task.dtype}",
        "name": contender.name,
        "ours": contender.ours,
        "error": error,
        "call": facts(record),
        "captures": [facts(capture) for capture in gpu.captures],
    }


def script(name: str) -> list[str]:
    """What a script of ``benchmarks`` prints; it calls wrong what a GPU without values computes."""
    with redirect_stdout(io.StringIO()) as printed:
        importlib.import_module(name).main(["--device", "cuda"])
    return printed.getvalue().splitlines()


def facts(record: Record) -> dict[str, Any]:
    """JSON-ready."""
    return {"launches": dict(record.launches), "waits": record.waits}


def pretend_cuda_build() -> None:
    """The operators of the CUDA build, without kernels: only their fakes are called."""
    _cuda._BUILD = _cuda.CudaBuild(True, "pretended")
    for op in OPS.values():
        if op.cuda is None:
            continue
        for operator in op.operators:
            if "quantised" not in operator.name:  # e4m3 is Triton's alone
                torch.library.define(f"blip3o_fast_cuda::{operator.name}", operator.schema)
        op.fused[Impl.CUDA] = bind(op, "blip3o_fast_cuda")


def pretend_compiler() -> None:
    """``torch.compile`` leaves a function as it is; what it would compile is walked."""
    torch.compile = lambda function, **options: function
    torch.compiler.cudagraph_mark_step_begin = lambda: None
    torch._dynamo.mark_static_address = lambda tensor: None


BAITS: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda x: x[0].item(),
    "bool": lambda x: bool(x.isfinite().all()),
    "cpu": lambda x: x.cpu(),
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "indexed by the host": lambda x: x[torch.tensor([0, 2])],
    "copied to the host": lambda x: torch.empty(3).copy_(x),
    "copied to the device": lambda x: x.copy_(torch.ones(3)),
    "a list": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "synchronize": lambda x: torch.cuda.synchronize(),
    "an event": lambda x: torch.cuda.current_stream().record_event().synchronize(),
}
"""What makes the host wait for a device; that a walk sees each of them is tested."""


def say(**line: Any) -> None:
    """A line of JSON."""
    sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    sys.exit(main())
