"""Numbers of a step on their way to the host, and the watch over broken training."""

import math
from types import SimpleNamespace

import pytest
import torch

from blip3o_fast.processes import World
from blip3o_fast.training.step_records import NonFiniteGradients, Pending, Recorder


def pending(step, *, norm=1.0, scale=1.0, keys=("a", "b")):
    finite = float(math.isfinite(norm))
    numbers = torch.tensor([1.0, 2.0, 3.0, math.nan, 5.0, norm, 0.5, finite, scale])
    records = [SimpleNamespace(key=key) for key in keys]
    return Pending(step, 0, 1e-3, 0.25, numbers, SimpleNamespace(read=lambda: records))


def recorder(**changes):
    return Recorder(World(), **{"max_nonfinite": 2, "scaled": False, **changes})


def test_records_carry_what_the_step_left():
    mine = recorder()
    mine.pending += [pending(1), pending(2, norm=math.inf)]
    first, second = mine.flush()
    assert (first.loss, first.velocity_loss, first.cosine_loss) == (1.0, 2.0, None)
    assert (first.grad_norm, first.clip_bound, first.clipped, first.skipped) == (
        1.0,
        0.5,
        True,
        False,
    )
    assert (second.grad_norm, second.clipped, second.skipped) == (None, False, True)
    assert first.seconds == second.seconds > 0
    assert mine.flush() == []


def test_too_many_bad_steps_in_a_row_name_their_batches():
    mine = recorder()
    mine.pending += [pending(i, norm=math.nan, keys=(f"key{i}",)) for i in (1, 2)]
    mine.flush()
    mine.pending += [pending(3), pending(4, norm=math.nan), pending(5, norm=math.nan)]
    mine.flush()
    mine.pending.append(pending(6, norm=math.nan, keys=("photo 7", "photo 8")))
    with pytest.raises(
        NonFiniteGradients, match=r"in 3 consecutive steps.*step 6: photo 7, photo 8"
    ):
        mine.flush()


def test_a_loss_scaler_at_work_is_no_breakdown_until_its_scale_is_spent():
    mine = recorder(scaled=True)
    mine.pending += [pending(i, norm=math.inf, scale=2.0**i) for i in range(16, 0, -1)]
    mine.flush()
    mine.pending += [pending(i, norm=math.inf, scale=1.0) for i in range(3)]
    with pytest.raises(NonFiniteGradients):
        mine.flush()
