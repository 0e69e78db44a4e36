"""The conventions of a model: one record holds every choice in which they differ.

The published implementation trains on the path of ``flow.path``, but contradicts it elsewhere.
``DiTConfig.conventions`` names a record. A third set of conventions is one more record here.

==========================  ===========================  ========================================
choice                      ``consistent``               ``published``
==========================  ===========================  ========================================
time labels of the sampler  0 to 1                       1 to 0, while the state moves by + dt v
Heun's second label         t + dt                       t + dt, which reaches 1 + dt
clamp of the state          none                         +-50 after every step
clean estimate in the loss  x_t + (1 - t) v              x_t - (1 - t) v, two terms over t > 0.5
rotary embedding            a rotation                   a shear (see ``model.positions``)
cross-attention positions   the same rotary embedding    none
too few learned positions   refused                      left out for all tokens
input stream                state + aligned EVA tokens   state
epsilon of AdaLN's norm     rms_norm_eps                 1e-6, whatever rms_norm_eps says
timestep input              1000 t                       t
state that enters           clean_coefficient(t) x_t     x_t
velocity                    network's + c(t) x_t         network's
==========================  ===========================  ========================================
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from blip3o_fast.words import GridName

ConventionsName = Literal["consistent", "published"]


def clean_coefficient(t: Tensor) -> Tensor:
    """``t / (t^2 + (1 - t)^2)``. Times ``x_t`` it is the best linear guess of ``x_1`` from ``x_t``.

    The consistent conventions give the network this guess instead of ``x_t``. At t = 0 the state is
    noise and says nothing about the data, so the guess is zero. The output skip is then ``-x_t``.
    So the result of a single Euler step does not depend on the noise.
    """
    return t / (t.square() + (1 - t).square())


def skip_coefficient(t: Tensor) -> Tensor:
    """``c(t) = (2t - 1) / (t^2 + (1 - t)^2)``: the velocity is ``c(t) x_t`` plus the network's
    output.

    ``c(t) x_t`` is the best linear guess of ``v = x_1 - eps`` from ``x_t``, if x_1 and eps are
    uncorrelated and have unit variance: c = E[v x_t] / E[x_t^2]. Without it the network must carry
    the noise through all its norms to the output. At t = 0 the answer is E[x_1] - eps, and any part
    of eps that is lost is an error. The skip of arXiv:2206.00364 is the same idea. It has no
    parameters.
    """
    return (2 * t - 1) / (t.square() + (1 - t).square())


@dataclass(frozen=True)
class Conventions:
    """Everything that one set of conventions decides.

    Attributes:
        time_scale: the timestep embedding reads ``time_scale * t``.
        input_gain: from t to the weight of the state that enters the network; None: 1.
        output_skip: from t to the weight of the state that is added to its output; None: 0.
        aligned_stream: add the adapted EVA token i to token i of the input stream.
        rotary: layout of the rotary angles, see ``model.positions``.
        head_width_multiple: the head width must be a multiple of it, for that layout.
        cross_positions: whether cross-attention rotates its queries and keys.
        needs_positions: whether a model without ``use_3d_rope`` must have a learned position for
            every token; otherwise a table that is too short is left out.
        ada_ln_eps: epsilon of the norm inside AdaLN; None: ``rms_norm_eps``.
        time_grid: the default grid of the sampler.
        noise_in_feature_dtype: draw noise in the dtype of the features, not in fp32.
        loss: the form of the loss, see ``reference.flow_loss``: ``published`` has the opposite sign
            in its clean estimate, and clamps and caps.
        loss_masks: whether two terms of the loss count only samples with t > 0.5.
    """

    time_scale: float
    input_gain: Callable[[Tensor], Tensor] | None
    output_skip: Callable[[Tensor], Tensor] | None
    aligned_stream: bool
    rotary: Literal["rotation", "shear"]
    head_width_multiple: int
    cross_positions: bool
    needs_positions: bool
    ada_ln_eps: float | None
    time_grid: GridName
    noise_in_feature_dtype: bool
    loss: Literal["consistent", "published"]
    loss_masks: bool


CONVENTIONS: dict[str, Conventions] = {
    "consistent": Conventions(
        time_scale=1000.0,
        input_gain=clean_coefficient,
        output_skip=skip_coefficient,
        aligned_stream=True,
        rotary="rotation",
        head_width_multiple=4,
        cross_positions=True,
        needs_positions=True,
        ada_ln_eps=None,
        time_grid="ascending",
        noise_in_feature_dtype=False,
        loss="consistent",
        loss_masks=False,
    ),
    "published": Conventions(
        time_scale=1.0,
        input_gain=None,
        output_skip=None,
        aligned_stream=False,
        rotary="shear",
        head_width_multiple=8,
        cross_positions=False,
        needs_positions=False,
        ada_ln_eps=1e-6,
        time_grid="published",
        noise_in_feature_dtype=True,
        loss="published",
        loss_masks=True,
    ),
}


def find_conventions(name: str) -> Conventions:
    """The record of that name.

    Raises:
        ValueError: naming the known ones.
    """
    if name not in CONVENTIONS:
        raise ValueError(f"conventions: expected {' or '.join(CONVENTIONS)}, got {name!r}")
    return CONVENTIONS[name]
