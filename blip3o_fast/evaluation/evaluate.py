"""The evaluation of a model on two sides of a data set, as a ``Report``."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from blip3o_fast.checked import Count, Index, check
from blip3o_fast.data import Batch, EmbeddingDataset, SampleRecord
from blip3o_fast.evaluation.accumulator import MetricAccumulator
from blip3o_fast.evaluation.baselines import Baselines
from blip3o_fast.evaluation.metrics import token_cosines
from blip3o_fast.evaluation.report import Photo, Report, Result, spread_samples, token_map
from blip3o_fast.flow import FittedSolver, find_solver
from blip3o_fast.pretrained import BLIP3oDiT
from blip3o_fast.progress import Progress
from blip3o_fast.quantities import count
from blip3o_fast.seeds import sample_seed
from blip3o_fast.words import GridName, SolverName

ImageOf = Callable[[SampleRecord], NDArray[np.uint8] | None]
"""The crop that a sample was encoded from, ``[height, width, 3]``; None if it is unknown."""


@dataclass(frozen=True)
class EvaluationSettings:
    """How to measure.

    Attributes:
        evaluations: numbers of calls of the network to sample with, each at least 1.
        solver: solver that spends them. One that calls the network twice per step takes half as
            many steps; Euler's method takes over where the number does not divide.
        guidance_scale: 1 is no guidance.
        time_grid: None follows the model's conventions.
        batch_size: samples generated at once.
        seed: decides the noise of a sample together with its key, whatever its batch.
        max_samples: held-out samples to use, evenly spread; None is all.
        max_training_samples: training samples that the baselines see, evenly spread; None is all.
        photos: samples to show with their token maps.
        bootstrap: resamples of the photos for the intervals.
    """

    evaluations: tuple[Count, ...] = (1, 2, 4, 10, 25, 50, 100)
    solver: SolverName = "heun"
    guidance_scale: float = 1.0
    time_grid: GridName | None = None
    batch_size: Count = 64
    seed: int = 0
    max_samples: Count | None = None
    max_training_samples: Count | None = None
    photos: Index = 5
    bootstrap: Index = 2000

    def __post_init__(self) -> None:
        check(self)
        if not self.evaluations:
            raise ValueError("evaluations: expected at least one number, got none")

    def method(self, evaluations: int) -> tuple[str, int]:
        """Solver and number of steps that call the network ``evaluations`` times."""
        stages = find_solver(self.solver).evaluations_per_step
        if evaluations % stages:
            return "euler", evaluations
        return self.solver, evaluations // stages


DEFAULTS = EvaluationSettings()


def evaluate_model(
    model: BLIP3oDiT,
    training: EmbeddingDataset,
    heldout: EmbeddingDataset,
    settings: EvaluationSettings = DEFAULTS,
    *,
    title: str = "Evaluation",
    facts: Mapping[str, str] | None = None,
    history: Sequence[tuple[int, float]] = (),
    image_of: ImageOf | None = None,
    regression: BLIP3oDiT | None = None,
    progress: bool = True,
) -> Report:
    """Measure ``model`` on ``heldout`` beside baselines fitted on ``training``.

    Solvers that were fitted to the model (``model.fitted``) are measured as well, those for the
    guidance weight of ``settings``.

    Args:
        model: on the device where it should run.
        training: the side that the model learned from.
        heldout: a side that shares no photo with it.
        settings: how to measure.
        title, facts, history: shown in the report.
        image_of: finds the crops of the samples that are shown.
        regression: the same network trained at t = 0 alone, one more baseline.
        progress: show bars.

    Raises:
        ValueError: if the data do not fit the model.
    """
    device = model.device
    for measured in (model, regression):
        if measured is not None:
            check_fit(measured, heldout)
    baselines = Baselines.fit(
        read_batches(
            training,
            chosen(training, settings.max_training_samples),
            settings.batch_size,
            device,
            "baselines" if progress else None,
        ),
        has_cls=training.has_cls,
    )
    indices = chosen(heldout, settings.max_samples)

    def measure(
        predict: Callable[[Batch], Tensor],
        name: str,
        evaluations: int | None = None,
        solver_error: float | None = None,
    ) -> Result:
        accumulator = MetricAccumulator(baselines.mean.mean, has_cls=heldout.has_cls)
        label = name if progress else None
        for batch in read_batches(heldout, indices, settings.batch_size, device, label):
            accumulator.add(predict(batch), batch.clip, batch.keys, batch.sources)
        metrics = accumulator.finish(bootstrap=settings.bootstrap, seed=settings.seed)
        return Result(metrics, accumulator.scores(), evaluations, solver_error)

    dit = tuple(
        measure(lambda batch, n=n: translate(model, batch, settings, n), count(n, "evaluation"), n)
        for n in sorted(set(settings.evaluations))
    )
    fitted = tuple(
        measure(
            lambda batch, s=solver: translate(model, batch, settings, len(s), s),
            *(f"fitted, {count(n, 'evaluation')}", n, solver.error),
        )
        for n, solver in sorted(model.fitted.items())
        if solver.guidance_scale == settings.guidance_scale and settings.time_grid is None
    )
    mean = measure(lambda batch: baselines.mean.predict(batch.eva.float()), "mean")
    ridge = measure(lambda batch: baselines.ridge.predict(batch.eva.float()), "ridge")
    best = max(dit, key=lambda result: result.metrics.token_cosine.value)
    return Report(
        title,
        mean=mean,
        ridge=ridge,
        dit=dit,
        fitted=fitted,
        regression=None
        if regression is None
        else measure(lambda batch: translate(regression, batch, settings, 1), "regression"),
        grid=heldout.grid,
        facts=facts or {},
        history=tuple(history),
        photos=shown(model, heldout, indices, best, settings, image_of),
    )


def check_fit(model: BLIP3oDiT, data: EmbeddingDataset) -> None:
    """Raise ``ValueError`` unless the shards have the tokens and widths that the model reads."""
    config = model.config
    expected = (config.num_tokens, config.eva_embedding_size, config.clip_embedding_size)
    got = (data.tokens, data.eva_width, data.clip_width)
    if expected != got:
        raise ValueError(
            f"{data.folder}: expected (tokens, EVA width, CLIP width) {expected}, those of the "
            f"model, got {got}"
        )


def chosen(data: EmbeddingDataset, most: int | None) -> NDArray[np.int64]:
    """Indices of at most so many samples, evenly spread over the data set."""
    count = len(data) if most is None else min(most, len(data))
    if count < 1:
        raise ValueError(f"max_samples: expected at least 1, got {most}")
    return np.linspace(0, len(data) - 1, count).round().astype(np.int64)


def read_batches(
    data: EmbeddingDataset,
    indices: NDArray[np.int64],
    batch_size: int,
    device: torch.device,
    label: str | None,
) -> Iterator[Batch]:
    """Batches of the chosen samples on ``device``, with a bar where ``label`` names it."""
    starts = range(0, len(indices), batch_size)
    enabled = label is not None
    with Progress(label or "", len(indices), "sample", enabled=enabled, leave=False) as bar:
        for start in starts:
            batch = data.read(indices[start : start + batch_size])
            yield batch._replace(eva=batch.eva.to(device), clip=batch.clip.to(device))
            bar.update(len(batch.keys))


def translate(
    model: BLIP3oDiT,
    batch: Batch,
    settings: EvaluationSettings,
    evaluations: int,
    fitted: FittedSolver | None = None,
) -> Tensor:
    """CLIP tokens ``[b, N, C]`` sampled with so many calls of the network."""
    solver, steps = settings.method(evaluations)
    return model.generate(
        batch.eva.to(model.dtype),
        steps if fitted is None else evaluations,
        solver=solver if fitted is None else fitted,
        guidance_scale=settings.guidance_scale,
        time_grid=settings.time_grid,
        seeds=[sample_seed(key, settings.seed) for key in batch.keys],
    )


def shown(
    model: BLIP3oDiT,
    data: EmbeddingDataset,
    indices: NDArray[np.int64],
    best: Result,
    settings: EvaluationSettings,
    image_of: ImageOf | None,
) -> tuple[Photo, ...]:
    """Samples from worst to best with their token maps, and their crops if these are known."""
    picks = indices[list(spread_samples(best.scores, settings.photos))]
    if len(picks) == 0:
        return ()
    assert best.evaluations is not None
    device = model.device
    batch = data.read(picks)
    batch = batch._replace(eva=batch.eva.to(device), clip=batch.clip.to(device))
    cosines = token_cosines(translate(model, batch, settings, best.evaluations), batch.clip)
    patches = cosines[:, int(data.has_cls) :].cpu().numpy()
    return tuple(
        Photo(record.key, token_map(values, data.grid), image_of(record) if image_of else None)
        for record, values in zip(data.records(picks), patches, strict=True)
    )
