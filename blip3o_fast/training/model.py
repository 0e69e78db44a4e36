"""The model of a run, before its first step."""

import torch

from blip3o_fast.checkpoint import check_tensors
from blip3o_fast.pretrained import BLIP3oDiT
from blip3o_fast.training.randomness import seed_everything
from blip3o_fast.training.run_plan import TrainingPlan


def build_model(plan: TrainingPlan) -> BLIP3oDiT:
    """The plan's model in fp32 on its device, in training mode.

    Initial weights depend on the seed alone: they are drawn on the CPU, the same in every process.
    """
    seed_everything(plan.options.seed)
    model = BLIP3oDiT(plan.config)
    # The published layout has learned positions even where rotary ones replace them. Processes that
    # average gradients would wait for theirs.
    model.pos_embed.requires_grad_(not plan.config.use_3d_rope)
    if plan.initial is not None:
        check_tensors(plan.config, model.state_dict(), plan.initial.tensors)
        model.load_state_dict(plan.initial.tensors)
    return model.to(device=plan.device, dtype=torch.float32).train()
