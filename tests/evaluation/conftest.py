"""A small evaluation on simulated tokens: 24 samples of 8 photos, a 4 x 4 grid, 12 channels."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from blip3o_fast.evaluation import MetricAccumulator, Photo, Report, Result, token_map
from blip3o_fast.evaluation.report_plots import draw_plots
from blip3o_fast.report.style import DARK, LIGHT, Theme

GRID = (1, 4, 4)
EVALUATIONS = (1, 2, 3, 10, 100)


class Simulation:
    """Targets, and predictions of known quality."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        self.draw = lambda *shape: torch.randn(shape, generator=generator)
        self.keys = [f"photo{i // 3}_crop{i % 3}.jpg" for i in range(24)]
        self.sources = [f"photo{i // 3}" for i in range(24)]
        self.train_mean = 1 + self.draw(16, 12)
        self.target = self.train_mean + self.draw(24, 16, 12)

    def result(self, noise: float, evaluations: int | None = None) -> Result:
        return self.score(self.target + noise * self.draw(24, 16, 12), evaluations)

    def score(self, generated: torch.Tensor, evaluations: int | None = None) -> Result:
        accumulator = MetricAccumulator(self.train_mean)
        accumulator.add(generated, self.target, self.keys, self.sources)
        return Result(accumulator.finish(bootstrap=200), accumulator.scores(), evaluations)


@pytest.fixture(scope="session")
def make_report() -> Callable[..., Report]:
    """Build a report whose DiT has the given noise at its best, against ridge with noise 0.5."""

    def make(best_noise: float = 0.3, **fields) -> Report:
        simulation = Simulation()
        mean = simulation.score(simulation.train_mean.expand(24, 16, 12))
        ridge = simulation.result(0.5)
        dit = tuple(
            simulation.result(best_noise * (1 + i / 4), n) for i, n in enumerate(EVALUATIONS)
        )
        image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        position = token_map(np.array(dit[0].metrics.position_cosine), GRID)
        defaults = {
            "title": "Simulated tokens",
            "history": tuple((step, 2.0 / step) for step in range(1, 30)),
            "photos": (
                Photo(simulation.keys[4], position, image),
                Photo(simulation.keys[20], position - 0.1),
            ),
            "facts": {"model": "none", "strength": "1e-3"},
        }
        return Report(mean=mean, ridge=ridge, dit=dit, grid=GRID, **{**defaults, **fields})

    return make


@pytest.fixture(scope="session")
def report(make_report: Callable[..., Report]) -> Report:
    return make_report()


@pytest.fixture(scope="session")
def drawn(report: Report) -> dict[Theme, dict[str, bytes]]:
    """The report's plots in both themes; drawing takes a second each."""
    return {theme: draw_plots(report, theme) for theme in (LIGHT, DARK)}
