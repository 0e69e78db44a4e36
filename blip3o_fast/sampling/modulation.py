"""The modulations of every norm at every time of a grid, computed before the first step.

A norm site computes ``rms(rms(x; w1); w2) * (1 + scale) + shift`` where (shift, scale) depend on
the time alone. One GEMM gives both for all distinct times and all sites (73 in base), and
``w2 * (1 + scale)`` is folded into one row, so that a site reads w1, one folded weight and one
shift. Heun's second evaluation and the next step's first share their time, hence their row.

Memory: T * sites * 2 * D fp32, 449 KB a time for base (22.9 MB for the 51 times of 50 Heun steps),
and while it is built a stacked copy of the AdaLN projections, 86 million parameters for base.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip3o_fast.model import DiT, clean_coefficient, skip_coefficient
from blip3o_fast.model.layers import TimestepEmbedder
from blip3o_fast.ops import Modulation
from blip3o_fast.sampling.weights import norm_sites, twin, whole


class LinearGuess(NamedTuple):
    """What the state says by itself, in the consistent conventions; 0-d weights of the state.

    ``clean`` times the state is what the network sees, ``skip`` times the state is added to what it
    answers.
    """

    clean: Tensor
    skip: Tensor


class Sites(NamedTuple):
    """What the time decides in one evaluation.

    ``openings`` modulate what opens each sub-layer and the output, ``closings`` what closes each
    sub-layer. ``guess`` weighs the state, None where the network sees it as it is.
    """

    openings: list[Modulation]
    closings: list[Modulation | None]
    guess: LinearGuess | None


def modulation_table(model: DiT, times: Sequence[float], dtype: torch.dtype) -> Tensor:
    """``w2 * (1 + scale)`` and ``shift`` of every site, ``[T, sites, 2, D]``, all in ``dtype``."""
    sites = norm_sites(model)
    with torch.device("meta"):
        blank = TimestepEmbedder(model.config)
    embed = twin(blank, model.timestep_embedder, dtype)
    t = torch.tensor(times, device=model.input_proj.weight.device, dtype=dtype)
    activated = F.silu(embed(t))
    linears = [cast(nn.Linear, ada_ln.adaLN_modulation[1]) for _, ada_ln in sites]
    weight = torch.cat([whole(linear.weight) for linear in linears]).to(dtype)
    bias = torch.cat([whole(linear.bias) for linear in linears]).to(dtype)
    stacked = F.linear(activated, weight, bias)
    shift, scale = stacked.view(len(times), len(sites), 2, -1).unbind(2)
    inner = torch.stack([whole(ada_ln.norm.weight) for _, ada_ln in sites]).to(dtype)
    return torch.stack((inner * (1 + scale), shift), dim=2)


def linear_guesses(model: DiT, times: Sequence[float], dtype: torch.dtype) -> Tensor | None:
    """The weights of ``LinearGuess`` at each time, ``[T, 2]`` in ``dtype``, or None.

    The times are rounded to ``dtype`` first, as the plain model is told them.
    """
    if model.config.conventions != "consistent":
        return None
    t = torch.tensor(times, device=model.input_proj.weight.device, dtype=dtype)
    return torch.stack((clean_coefficient(t), skip_coefficient(t)), dim=1)


def site_modulations(
    norms: tuple[Tensor, ...],
    row: Tensor,
    guess: LinearGuess | None,
    sublayers: int,
    batch: int,
) -> Sites:
    """Views of one row ``[sites, 2, D]`` of the table, in the form that the norm ops take.

    The scale is folded into w2 already, so what the ops see as scale is zero.
    """
    zero = row.new_zeros(1, row.shape[-1]).expand(batch, -1)
    modulations = [
        Modulation(w1, folded, shift.expand(batch, -1), zero)
        for w1, (folded, shift) in zip(norms, row, strict=True)
    ]
    openings, closings = modulations[: sublayers + 1], modulations[sublayers + 1 :]
    return Sites(openings, [*closings] or [None] * sublayers, guess)
