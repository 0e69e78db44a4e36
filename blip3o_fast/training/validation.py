"""How well the model does on samples that it never trains on.

Every validation uses the same samples, noise and times, so two validations differ by the weights
only. Sampling goes through ``model.generate``. Samples are distributed over the processes in turn.
Every process makes the same number of forward passes, because those of a sharded model are
collective.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from blip3o_fast.data.dataset import EmbeddingDataset
from blip3o_fast.data.order import epoch_order
from blip3o_fast.errors import NonFiniteSamples
from blip3o_fast.flow import RectifiedFlowLoss, draw_noise, interpolate
from blip3o_fast.pieces import Pieces
from blip3o_fast.pretrained import BLIP3oDiT
from blip3o_fast.processes import World
from blip3o_fast.sampling import forget
from blip3o_fast.seeds import stream_seed
from blip3o_fast.training.run_plan import TrainingPlan

THRESHOLDS = (0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Validation:
    """Means over held-out samples.

    Attributes:
        step: optimizer steps taken before.
        samples: how many.
        loss: the training loss, at times spread evenly over [0, 1].
        token_cosine: cosine of generated and true tokens, over tokens and samples.
        image_cosine: cosine of their token means, the published similarity.
        mse: squared error per number, in the units of the data.
        above: share of samples whose image cosine exceeds 0.7, 0.8 and 0.9.
        seconds: how long it took.
    """

    step: int
    samples: int
    loss: float
    token_cosine: float
    image_cosine: float
    mse: float
    above: tuple[float, float, float]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "above": list(self.above)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Validation":
        """Read what ``to_dict`` wrote."""
        fields = {name: values[name] for name in cls.__dataclass_fields__}
        return cls(**{**fields, "above": tuple(values["above"])})


class Validator:
    """Validates a model by a fixed set of held-out samples.

    Args:
        plan: of the run.
        world: the processes that share the work.
    """

    def __init__(self, plan: TrainingPlan, world: World) -> None:
        self.plan, self.world = plan, world
        self.indices = heldout_sample(plan.heldout, plan.options.eval_num_samples)
        share = plan.options.batch_size // world.size
        self.pieces = Pieces(
            plan.options.eval_batch_size or share,
            retry=plan.options.parallel != "fsdp" or world.control is None,
        )

    def run(
        self, model: BLIP3oDiT, step: int, stop: Callable[[], bool] = lambda: False
    ) -> Validation | None:
        """Validate ``model``; None if ``stop()``, on which all processes agree, became true."""
        try:
            return self._run(model, step, stop)
        finally:
            # The next step makes packed weights and graphs stale; until then they only take memory.
            forget(model)

    def _run(self, model: BLIP3oDiT, step: int, stop: Callable[[], bool]) -> Validation | None:
        started = time.perf_counter()
        count, ranks = len(self.indices), self.world.size
        rows = -(-count // ranks)
        places = [min(self.world.rank + ranks * i, count - 1) for i in range(rows)]
        real = [self.world.rank + ranks * i < count for i in range(rows)]
        sums = torch.zeros(4 + len(THRESHOLDS), dtype=torch.float64, device="cpu")
        batch = self.pieces.limit
        for start in range(0, rows, batch):
            if stop():
                return None
            chosen = slice(start, start + batch)
            weights = torch.tensor(real[chosen], dtype=torch.float64, device="cpu")
            scores = self._scores(model, places[chosen])
            sums += torch.where(weights[:, None] > 0, scores, 0.0).sum(0)
        means = [float(x) for x in self.world.sum(sums) / count]
        return Validation(
            step=step,
            samples=count,
            loss=means[0],
            token_cosine=means[1],
            image_cosine=means[2],
            mse=means[3],
            above=(means[4], means[5], means[6]),
            seconds=time.perf_counter() - started,
        )

    def _scores(self, model: BLIP3oDiT, places: list[int]) -> Tensor:
        """Values per sample ``[b, 7]``, fp64 on the CPU."""

        def work(piece: slice, last: bool) -> Tensor:
            del last
            return self._piece_scores(model, places[piece])

        return torch.cat(self.pieces.run(len(places), work, reset=lambda: None))

    @torch.no_grad()
    def _piece_scores(self, model: BLIP3oDiT, places: list[int]) -> Tensor:
        plan, config = self.plan, self.plan.config
        batch = plan.heldout.read([int(self.indices[place]) for place in places])
        eva, target = batch.eva.to(plan.device).float(), batch.clip.to(plan.device).float()
        noise = draw_noise(
            (len(places), config.num_tokens, config.clip_embedding_size),
            device=plan.device,
            seeds=[stream_seed(0, place) for place in places],
        )
        try:
            with plan.precision.autocast():
                generated = model.generate(
                    eva_features=eva,
                    num_inference_steps=plan.options.eval_inference_steps,
                    use_heun=plan.options.use_heun_inference,
                    noise=noise,
                )
        except NonFiniteSamples:  # a run that diverges says so by its metrics, and is not stopped
            generated = torch.full_like(target, torch.nan)
        t = (torch.tensor(places, device=plan.device) + 0.5) / len(self.indices)
        losses = self._losses(model, eva, target * config.simple_scale_factor, noise, t)
        return torch.cat((losses[:, None], similarities(generated, target)), dim=1).cpu()

    def _losses(
        self, model: BLIP3oDiT, eva: Tensor, x_1: Tensor, noise: Tensor, t: Tensor
    ) -> Tensor:
        """The training loss of each sample, ``[b]`` fp64, without dropout."""
        loss: RectifiedFlowLoss = self.plan.loss
        x_t = interpolate(x_1, noise, t)
        training = model.training
        model.eval()
        with self.plan.precision.autocast():
            velocity = model(x_t, t, eva, return_dict=False)
        model.train(training)
        assert isinstance(velocity, Tensor)
        each = (
            loss(
                velocity[i : i + 1], x_t[i : i + 1], x_1[i : i + 1], noise[i : i + 1], t[i : i + 1]
            )
            for i in range(len(t))
        )
        return torch.stack([terms.total for terms in each]).double()


def heldout_sample(heldout: EmbeddingDataset, count: int) -> list[int]:
    """At most ``count`` samples from all over the held-out side, the same ones every time."""
    return [int(i) for i in epoch_order(len(heldout), 0, 0)[:count]]


def similarities(generated: Tensor, target: Tensor) -> Tensor:
    """Token cosine, image cosine, squared error and thresholds of each sample: ``[b, 6]`` fp64."""
    generated, target = generated.float(), target.float()
    tokens = F.cosine_similarity(generated, target, dim=-1, eps=1e-8).mean(1)
    images = F.cosine_similarity(generated.mean(1), target.mean(1), dim=-1, eps=1e-8)
    error = (generated - target).square().mean((1, 2))
    above = [(images > threshold).double() for threshold in THRESHOLDS]
    return torch.stack([tokens.double(), images.double(), error.double(), *above], dim=1)
