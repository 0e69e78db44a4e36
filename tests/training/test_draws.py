"""Times and noise depend on (seed, step, row) alone, whatever the layout of the run."""

import pytest
import torch

from blip3o_fast.training.draws import GROUP, draw

CPU = torch.device("cpu")


def draws(rows, *, seed=0, step=3, batch=40, dropout=0.0, at_zero=0.0):
    return draw(
        *(seed, step, rows, batch, (5, 4)),
        distribution="beta",
        zero_time_fraction=at_zero,
        condition_dropout=dropout,
        device=CPU,
    )


@pytest.mark.parametrize("ranks", [2, 4, 5, 40])
def test_shares_of_the_ranks_make_the_whole(ranks):
    chosen = {"dropout": 0.5, "at_zero": 0.5}
    whole = draws(range(40), **chosen)
    share = 40 // ranks
    parts = [draws(range(r * share, (r + 1) * share), **chosen) for r in range(ranks)]
    for mine, theirs in zip(whole, map(torch.cat, zip(*parts, strict=True)), strict=True):
        assert torch.equal(mine, theirs)


def test_steps_and_seeds_draw_differently():
    first = draws(range(40))
    for other in (draws(range(40), step=4), draws(range(40), seed=1)):
        assert not torch.equal(first.noise, other.noise)
        assert not torch.equal(first.t, other.t)
    assert torch.equal(first.noise, draws(range(40)).noise)
    groups = first.noise[:GROUP], first.noise[GROUP : 2 * GROUP]
    assert not torch.equal(*groups)


def test_noise_is_standard_normal_and_times_stay_inside():
    big = draws(range(512), step=0, batch=512, dropout=0.25)
    assert abs(float(big.noise.mean())) < 0.03 and abs(float(big.noise.std()) - 1) < 0.03
    assert float(big.t.min()) > 0.00099 and float(big.t.max()) < 0.99901
    # Beta(1/2, 1/2): P(t < 0.1) = 2/pi asin(sqrt(0.1)) = 0.205
    assert float((big.t < 0.1).float().mean()) == pytest.approx(0.205, abs=0.06)
    assert float(big.keep.float().mean()) == pytest.approx(0.75, abs=0.06)


def test_a_share_of_the_samples_is_at_zero():
    """The others keep their times, and nothing else changes."""
    plain, half, all_of_them = (draws(range(512), batch=512, at_zero=p) for p in (0.0, 0.5, 1.0))
    zero = half.t == 0
    assert float(zero.float().mean()) == pytest.approx(0.5, abs=0.07)
    assert torch.equal(half.t[~zero], plain.t[~zero])
    assert torch.equal(all_of_them.t, torch.zeros(512))
    for other in (half, all_of_them):
        assert torch.equal(other.noise, plain.noise) and torch.equal(other.keep, plain.keep)


def test_global_generators_are_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    draws(range(40))
    assert torch.equal(before, torch.get_rng_state())
