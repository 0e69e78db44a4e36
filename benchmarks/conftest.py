"""pytest-benchmark over the very cases of ``blip3o-fast bench``.

    pytest benchmarks --benchmark-only -m cpu                under 3 minutes on two cores
    pytest benchmarks --benchmark-only -m "gpu and not slow"     the fast set of a GPU
    pytest benchmarks --published CHECKOUT                   the published implementation as well

A test is one contender at one task; choose with ``-k "sandwich_join and triton"``. The table of
pytest-benchmark shows how long a caller waits. In its JSON, ``extra_info`` holds the measurement as
in a record: the device's time, cold and warm, the host's time for a launch, the work that cannot be
avoided, and the fraction of the limit. ``machine_info`` holds the environment and every peer. Here
contenders are timed one after the other; ``blip3o-fast bench`` times them in turns.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest
import torch

from blip3o_fast.benchmarking.cases import Case, Contender
from blip3o_fast.benchmarking.ceilings import Ceilings, measure_ceilings
from blip3o_fast.benchmarking.checkout import describe_checkout
from blip3o_fast.benchmarking.clock import time_alone
from blip3o_fast.benchmarking.environment import describe_environment
from blip3o_fast.benchmarking.peers import find_peers
from blip3o_fast.benchmarking.selection import Settings, choose_sources, dtypes
from blip3o_fast.benchmarking.suite import Result, explain, measured
from blip3o_fast.benchmarking.watch import make_watch

SECONDS, LEAST, MOST = 0.3, 3, 50
"""How many seconds, and how many rounds, pytest-benchmark calls a contender."""


@dataclass(frozen=True)
class Place:
    """A function that makes a case anew for its tests, so that its models are freed after them."""

    make: Callable[[], Iterator[Case]]
    index: int
    device: torch.device

    def case(self) -> Case:
        """The case."""
        return next(islice(self.make(), self.index, None))


def pytest_addoption(parser: pytest.Parser) -> None:
    """The checkout of the published implementation."""
    parser.addoption("--published", metavar="FOLDER", help="checkout of the published repository")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each contender at each task; its name begins with the group."""
    if "contender" not in metafunc.fixturenames:
        return
    folder = metafunc.config.getoption("--published")
    published = Path(folder) if folder else None
    params: dict[str, Any] = {}
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for quick in (True, False):
            settings = Settings(torch.device(device), quick=quick, published=published)
            for name, param in _params(settings):
                params.setdefault(name, param)
    metafunc.parametrize(("place", "contender"), list(params.values()), indirect=["place"])


def _params(settings: Settings) -> Iterator[tuple[str, Any]]:
    """Name and parameters of each test; those of the full run alone are slow."""
    device, quick = settings.device, settings.quick
    marks = [pytest.mark.gpu] if device.type == "cuda" else [pytest.mark.cpu] if quick else []
    if not quick:
        marks.append(pytest.mark.slow)
    for _, make in choose_sources(settings):
        for index, case in enumerate(make()):
            task, place = case.task, Place(make, index, device)
            for contender in case.contenders:
                words = (task.group, task.name, task.shape, task.dtype, contender.name, device.type)
                name = "-".join(words).replace(", ", "_").replace(" ", "_")
                yield name, pytest.param(place, contender.name, marks=marks, id=name)


@pytest.fixture(scope="module")
def place(request: pytest.FixtureRequest) -> Iterator[tuple[Case, torch.device]]:
    """A case, its networks made once for all of its contenders, and its device."""
    yield request.param.case(), request.param.device
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def ceilings() -> Callable[[torch.device], Ceilings]:
    """The ceilings of a device, measured at first use."""
    known: dict[str, Ceilings] = {}

    def find(device: torch.device) -> Ceilings:
        if device.type not in known:
            known[device.type] = measure_ceilings(device, dtypes(device), seconds=0.3)
        return known[device.type]

    return find


@pytest.fixture
def measure(
    benchmark: Any,
    place: tuple[Case, torch.device],
    contender: str,
    ceilings: Callable[[torch.device], Ceilings],
) -> Callable[[], None]:
    """Time a contender at a task; a peer that cannot run here is skipped with its reason."""
    case, device = place
    chosen = next(c for c in case.contenders if c.name == contender)

    def run() -> None:
        task = case.task
        benchmark.group = f"{task.group}: {task.name}, {task.shape}, {task.dtype}"
        with ExitStack() as stack:
            try:
                _time(benchmark, case, chosen, device, ceilings(device), stack)
            except Exception as error:
                if chosen.ours and not isinstance(error, torch.OutOfMemoryError):
                    raise
                pytest.skip(f"{contender}: {explain(error)}")

    return run


def _time(
    benchmark: Any,
    case: Case,
    contender: Contender,
    device: torch.device,
    ceilings: Ceilings,
    stack: ExitStack,
) -> None:
    prepared = contender.prepare()
    if prepared.close is not None:
        stack.callback(prepared.close)
    watch = make_watch(prepared, device)
    watch.start()
    timing = time_alone(watch, Settings(device, quick=True).budget)
    result = Result(
        *(case.task, contender.name, contender.ours), timing, prepared.rotation, watch.peak
    )
    measurement = measured(result, ceilings)
    benchmark.extra_info.update(asdict(measurement), fraction=measurement.fraction)
    benchmark.extra_info.update(per_call=prepared.per_call)
    calls = cycle(prepared.calls)

    def once() -> None:
        next(calls)()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    rounds = int(SECONDS / (timing.median * prepared.per_call))
    benchmark.pedantic(once, rounds=min(MOST, max(LEAST, rounds)), iterations=1)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    """Device, driver, clocks, versions, commit; peers, and why each absent one is absent."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = config.getoption("--published")
    machine_info["environment"] = describe_environment(device)
    machine_info["peers"] = {
        "published implementation": describe_checkout(Path(folder) if folder else None),
        **find_peers(device),
    }


def pytest_report_header() -> list[str]:
    """Every peer, and why each absent one is absent."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return [f"peer {name}: {state}" for name, state in find_peers(device).items()]
