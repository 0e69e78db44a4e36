"""The straight path between noise and data, and the one statement of its conventions.

    t = 0 is noise, t = 1 is data
    x_t = (1 - t) eps + t x_1          v = x_1 - eps          x_1 = x_t + (1 - t) v

This is rectified flow (arXiv:2209.03003). Everything else in the library imports it from here.

The published implementation trains on this path but contradicts it elsewhere, so ``conventions``
names one of two columns, a field of ``DiTConfig``:

=========================  ============================  =========================================
matter                     ``consistent``                ``published``
=========================  ============================  =========================================
sampler's time labels      0 to 1                        1 to 0, while the state moves by + dt v
Heun's second label        t + dt                        t + dt, which reaches 1 + dt
clamp of the state         none                          +-50 after every step
clean estimate in loss     x_t + (1 - t) v               x_t - (1 - t) v, two terms over t > 0.5
rotary embedding           a rotation                    a shear (see ``model.positions``)
cross-attention positions  the same rotary embedding     none
input stream               state + aligned EVA tokens    state
timestep input             1000 t                        t
output of the network      v - c(t) x_t (``model.dit``)  v
=========================  ============================  =========================================
"""

import torch
from torch import Tensor


def interpolate(x_1: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """``x_t = (1 - t) noise + t x_1``; x_1 and noise ``[B, N, C]``, t ``[B]``."""
    return torch.lerp(noise, x_1, t.to(x_1.dtype)[:, None, None])


def velocity_target(x_1: Tensor, noise: Tensor) -> Tensor:
    """``v = x_1 - noise``, constant along the path."""
    return x_1 - noise


def clean_estimate(x_t: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """``x_1 = x_t + (1 - t) v``: where the straight line through ``x_t`` ends; t ``[B]``."""
    return x_t + (1 - t.to(x_t.dtype))[:, None, None] * velocity
