"""Times and noise depend on (seed, step, row) alone, whatever the layout of the run."""

import pytest
import torch

from blip3o_fast.training.draws import GROUP, draw

CPU = torch.device("cpu")


def draws(rows, *, seed=0, step=3, batch=40, dropout=0.0):
    return draw(
        *(seed, step, rows, batch, (5, 4)),
        distribution="beta",
        condition_dropout=dropout,
        device=CPU,
    )


@pytest.mark.parametrize("ranks", [2, 4, 5, 40])
def test_shares_of_the_ranks_make_the_whole(ranks):
    whole = draws(range(40), dropout=0.5)
    share = 40 // ranks
    parts = [draws(range(r * share, (r + 1) * share), dropout=0.5) for r in range(ranks)]
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
    big = draw(
        0, 0, range(512), 512, (16, 16), distribution="beta", condition_dropout=0.25, device=CPU
    )
    assert abs(float(big.noise.mean())) < 0.01 and abs(float(big.noise.std()) - 1) < 0.01
    assert float(big.t.min()) > 0.00099 and float(big.t.max()) < 0.99901
    # Beta(1/2, 1/2): P(t < 0.1) = 2/pi asin(sqrt(0.1)) = 0.205
    assert float((big.t < 0.1).float().mean()) == pytest.approx(0.205, abs=0.06)
    assert float(big.keep.float().mean()) == pytest.approx(0.75, abs=0.06)


def test_global_generators_are_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    draws(range(40))
    assert torch.equal(before, torch.get_rng_state())
