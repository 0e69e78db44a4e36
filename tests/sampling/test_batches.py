"""Seeds, micro-batches, running out of memory, progress and callbacks."""

from types import SimpleNamespace

import pytest
import torch
from golden_data import relative_error
from rounding import rounding_bound, roundings_of

from blip3o_fast import DiTConfig, SamplingPlan, generate
from blip3o_fast.pieces import even_slices
from blip3o_fast.sampling import batches
from blip3o_fast.sampling.batches import micro_batch, walk


def limit(model, evaluations):
    """A GEMM may sum in another order for another number of rows."""
    return rounding_bound(torch.float32, roundings_of(model.config, evaluations))


def test_a_sample_does_not_depend_on_its_batch(model, draw):
    eva, _ = draw(model, 5)
    seeds = [7, 3, 11, 3, 2**40]
    plan = SamplingPlan(model, steps=3, guidance_scale=2.0)
    together = plan(eva, seeds=seeds)
    order = [3, 0, 4, 1, 2]
    moved = plan(eva[order], seeds=[seeds[i] for i in order])
    alone = torch.cat([plan(eva[i : i + 1], seeds=[seeds[i]]) for i in range(5)])
    assert relative_error(moved, together[order]) < limit(model, 6)
    assert relative_error(alone, together) < limit(model, 6)


def test_seeds_decide_the_noise(model, draw):
    eva, _ = draw(model, 1)
    eva = eva.expand(3, -1, -1)
    out = generate(model, eva, 2, seeds=[5, 5, 6])
    assert relative_error(out[1], out[0]) < limit(model, 4)
    assert relative_error(out[2], out[0]) > 0.1


def test_generator_draws_as_published(make_model, draw):
    """In the dtype of the features for published weights, in fp32 otherwise."""
    for conventions, dtype in (("published", torch.bfloat16), ("consistent", torch.float32)):
        model = make_model(conventions=conventions)
        eva, noise = draw(model)
        eva = eva.bfloat16()
        drawn = torch.randn(noise.shape, generator=torch.Generator().manual_seed(4), dtype=dtype)
        got = generate(model, eva, 1, generator=torch.Generator().manual_seed(4))
        assert torch.equal(got, generate(model, eva, 1, noise=drawn.float()))


def test_default_noise_comes_from_torchs_generator(model, draw):
    eva, _ = draw(model)
    torch.manual_seed(3)
    first, second = generate(model, eva, 1), generate(model, eva, 1)
    torch.manual_seed(3)
    assert torch.equal(generate(model, eva, 1), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("solver", ["heun", "adams_bashforth2"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_micro_batches_do_not_change_the_result(model, draw, monkeypatch, solver, scale):
    eva, noise = draw(model, 7)
    options = {"steps": 3, "solver": solver, "guidance_scale": scale}
    whole = SamplingPlan(model, **options)(eva, noise)
    sizes = []
    advance = SamplingPlan._start

    def spy(self, engine, table, eva, *rest):
        sizes.append(len(eva))
        return advance(self, engine, table, eva, *rest)

    monkeypatch.setattr(SamplingPlan, "_start", spy)
    one = SamplingPlan(model, **options, working_memory=1)(eva, noise)
    assert sizes == [1] * 7
    assert relative_error(one, whole) < limit(model, 6)
    steps = []
    seen = SamplingPlan(model, **options, working_memory=1)(
        eva, noise, callback=lambda step, x: steps.append((step, x.clone()))
    )
    assert [step for step, _ in steps] == [0, 1, 2]
    assert torch.equal(steps[-1][1], seen) and torch.equal(seen, one)


def test_working_memory_bounds_the_micro_batch():
    base = DiTConfig.preset("base")
    cpu = torch.device("cpu")

    def samples(dtype, **options):
        options = {"guided": False, "working_memory": None, **options}
        return micro_batch(base, dtype, cpu, **options)

    assert 1 <= samples(torch.float32) <= 128
    assert samples(torch.float32) <= samples(torch.bfloat16)
    assert samples(torch.float32, guided=True) < samples(torch.float32)
    assert samples(torch.float32, working_memory=1) == 1
    needed = batches.evaluation_bytes(base, torch.float32)
    for gigabytes in (1, 2, 4):
        budget = gigabytes << 30
        assert samples(torch.float32, working_memory=budget) * needed <= budget


def test_stated_memory_covers_what_is_allocated(make_model, draw):
    """The estimate for a sample is above what the CPU allocator is asked for at its peak."""
    model = make_model(hidden_size=128, intermediate_size=384, num_tokens=256, grid=(1, 16, 16))
    eva, noise = draw(model, 4)
    plan = SamplingPlan(model, steps=1)
    plan(eva, noise)
    with torch.profiler.profile(profile_memory=True) as profile:
        plan(eva, noise)
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    config, dtype = model.config, torch.float32
    stated = 4 * (
        max(batches.evaluation_bytes(config, dtype), batches.conditioning_bytes(config, dtype))
        + batches.state_bytes(config)
        + batches.context_bytes(config, dtype)
    )
    assert 0 < peak < stated + 2 * 128 * 1024


@pytest.mark.parametrize("batch", [1, 2, 7, 64])
@pytest.mark.parametrize("limit", [1, 3, 64, 100])
def test_split_is_even_and_complete(batch, limit):
    parts = even_slices(0, batch, limit)
    sizes = [part.stop - part.start for part in parts]
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(batch))
    assert max(sizes) <= limit and max(sizes) - min(sizes) <= 1
    assert len(parts) == -(-batch // limit)


class Adding:
    """A run that adds 1 in the two moves of a step and holds ``capacity`` samples at most."""

    held = 0

    def __init__(self, out, part, capacity, fail_at):
        size = part.stop - part.start
        if size > capacity:
            raise torch.OutOfMemoryError
        self.x = torch.arange(part.start, part.stop).float().view(-1, 1, 1)
        self.capacity, self.fail_at, self.moves = capacity, fail_at, 0

    def advance(self):
        if self.moves == self.fail_at and len(self.x) > self.capacity // 2:
            raise torch.OutOfMemoryError
        self.moves += 1
        self.x = self.x + 0.5


@pytest.mark.parametrize("callback", [False, True])
@pytest.mark.parametrize("fail_at", [None, 0, 2])
@pytest.mark.parametrize("capacity", [2, 5, 12])
def test_out_of_memory_halves_the_micro_batch(capacity, fail_at, callback):
    out, released, seen = torch.empty(13, 1, 1), [], []
    limit = walk(
        lambda part, shared: Adding(out, part, capacity, fail_at),
        13,
        (False, True) * 3,
        out,
        limit=16,
        release=lambda: released.append(1),
        callback=(lambda step, x: seen.append((step, x.flatten().tolist()))) if callback else None,
    )
    assert torch.equal(out.flatten(), torch.arange(13) + 3.0)
    assert limit <= capacity and released
    if callback:
        assert [step for step, _ in seen] == [0, 1, 2]
        assert all(x == [i + step + 1.0 for i in range(13)] for step, x in seen)


def test_out_of_memory_on_one_sample_says_what_to_do():
    with pytest.raises(torch.OutOfMemoryError, match="one sample; free memory or"):
        walk(
            lambda part, shared: Adding(None, part, 0, None),
            4,
            (True,),
            torch.empty(4, 1, 1),
            limit=4,
            release=lambda: None,
        )


def test_the_limit_that_fitted_is_remembered(model, draw, monkeypatch):
    eva, noise = draw(model, 8)
    sizes = []
    start = SamplingPlan._start

    def small(self, engine, table, eva, *rest):
        sizes.append(len(eva))
        if len(eva) > 3:
            raise torch.OutOfMemoryError
        return start(self, engine, table, eva, *rest)

    monkeypatch.setattr(SamplingPlan, "_start", small)
    plan = SamplingPlan(model, steps=1)
    plan(eva, noise)
    assert sizes[:2] == [8, 4] and max(sizes[2:]) <= 3
    sizes.clear()
    plan(eva, noise)
    assert max(sizes) <= 3


def test_progress(model, draw, capsys):
    eva, noise = draw(model, 3)
    SamplingPlan(model, steps=4, working_memory=1)(eva, noise, progress=True)
    assert "12/12" in capsys.readouterr().err
    SamplingPlan(model, steps=4)(eva, noise)
    assert capsys.readouterr().err == ""


def test_callback_cannot_disturb_the_run(model, draw):
    eva, noise = draw(model)
    plan = SamplingPlan(model, steps=3)
    expected = plan(eva, noise)
    assert torch.equal(plan(eva, noise, callback=lambda step, x: x.zero_()), expected)


def test_a_batch_is_one_pass_unless_the_cache_is_to_hold_it(monkeypatch):
    """On CUDA: 4 GiB hold 128 samples of base, the 50 MiB of an H100's L2 cache the fewest."""
    base, cuda = DiTConfig.preset("base"), torch.device("cuda")
    properties = SimpleNamespace(L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)

    def samples(working_memory, device=cuda):
        return micro_batch(
            base, torch.bfloat16, device, guided=False, working_memory=working_memory
        )

    assert samples(None) == batches.LARGEST_MICRO_BATCH
    assert samples("L2") == batches.SMALLEST_IN_CACHE
    with pytest.raises(ValueError, match='"L2" needs a CUDA device, got cpu'):
        samples("L2", torch.device("cpu"))
