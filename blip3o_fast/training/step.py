"""One optimizer step on a global batch. The host does not wait for the device in it."""

from dataclasses import replace

import torch
from torch import Tensor

from blip3o_fast.data.dataset import Batch
from blip3o_fast.flow import interpolate
from blip3o_fast.pieces import Pieces
from blip3o_fast.processes import World
from blip3o_fast.training.clipping import global_norm
from blip3o_fast.training.distributed import Parallel
from blip3o_fast.training.draws import Draws, draw
from blip3o_fast.training.optimizer import apply_gradients, set_rate
from blip3o_fast.training.run_plan import TrainingPlan
from blip3o_fast.training.state import TrainingState


class OptimizerStep:
    """Times and noise, forward, loss, backward, clipping, update, average.

    Args:
        plan: of the run.
        world: the processes that share each batch.
        parallel: the model as training calls it.
        state: what a step changes.
    """

    def __init__(
        self, plan: TrainingPlan, world: World, parallel: Parallel, state: TrainingState
    ) -> None:
        options = plan.options
        self.plan, self.world, self.parallel, self.state = plan, world, parallel, state
        self.parameters = [p for p in state.model.parameters() if p.requires_grad]
        self.loss = replace(plan.loss, impl=state.model.impls.flow_loss)
        self.rows = options.batch_size // world.size
        limit = -(-self.rows // options.gradient_accumulation_steps)
        self.pieces = Pieces(limit, retry=world.size == 1)

    def __call__(self, batch: Batch, step: int) -> Tensor:
        """Take the step that follows ``step`` others.

        Args:
            batch: this process's rows of the global batch.
            step: decides the learning rate and the draws.

        Returns:
            The step's numbers, as ``Pending`` lists them, on the device.
        """
        state = self.state
        set_rate(state.optimizer, self.plan.schedule.rate(step))
        terms = self.gradients(batch, self.draw(step))
        state.scaler.unscale_(state.optimizer)
        clip = state.clipper.clip(global_norm(self.parameters))
        # A copy: update() changes the scaler's own tensor in place.
        scale = state.scaler.scale(torch.ones((), device=self.plan.device))
        apply_gradients(state.optimizer, state.scaler, clip)
        if state.average is not None:
            state.average.update()
        return torch.stack((*terms, clip.norm, clip.bound, clip.finite.float(), scale))

    def draw(self, step: int) -> Draws:
        """This process's times, noise and kept conditions."""
        options, config = self.plan.options, self.plan.config
        start = self.world.rank * self.rows
        return draw(
            options.seed,
            step,
            range(start, start + self.rows),
            options.batch_size,
            (config.num_tokens, config.clip_embedding_size),
            distribution=options.time_distribution,
            zero_time_fraction=options.zero_time_fraction,
            condition_dropout=options.condition_dropout,
            device=self.plan.device,
        )

    def gradients(self, batch: Batch, draws: Draws) -> Tensor:
        """Accumulate the scaled loss's gradients over micro-batches; returns loss terms ``[5]``."""
        x_1 = batch.clip.float() * self.plan.config.simple_scale_factor
        eva = self.plan.precision.features(batch.eva)

        def work(piece: slice, last: bool) -> Tensor:
            share = (piece.stop - piece.start) / self.rows
            with self.parallel.synchronised(last):
                return share * self.backward(x_1[piece], eva[piece], draws.rows(piece), share)

        def reset() -> None:
            self.state.optimizer.zero_grad(set_to_none=True)

        reset()
        return torch.stack(self.pieces.run(self.rows, work, reset)).sum(0)

    def backward(self, x_1: Tensor, eva: Tensor, draws: Draws, share: float) -> Tensor:
        """Forward and backward of one micro-batch; returns its loss terms ``[5]``."""
        x_t = interpolate(x_1, draws.noise, draws.t)
        eva = torch.where(draws.keep[:, None, None], eva, 0.0)
        with self.plan.precision.autocast():
            velocity = self.parallel.forward(x_t, draws.t, eva, return_dict=False)
        terms = self.loss(velocity, x_t, x_1, draws.noise, draws.t)
        self.state.scaler.scale(share * terms.total).backward()
        return torch.stack([term.detach() for term in terms])
