"""The captured step: buckets, windows, sharing. On the CPU a graph that calls stands in."""

from contextlib import nullcontext

import pytest
import torch
from golden_data import relative_error
from rounding import rounding_bound, roundings_of

from blip3o_fast import SamplingPlan, generate
from blip3o_fast.sampling import forget, graph
from blip3o_fast.sampling.graph import BUCKETS, GRAPHS, CapturedStep, GraphStore, bucket


class Calling:
    """Replays by taking the step again."""

    def __init__(self, stepper, pool):
        self.replay = stepper.advance


@pytest.fixture
def captured(monkeypatch):
    """Plans on the CPU go through buckets, windows and buffers; every capture is listed."""
    captures = []

    def capture(stepper, pool):
        captures.append(stepper)
        return Calling(stepper, pool)

    monkeypatch.setattr(graph, "_capture", capture)
    monkeypatch.setattr(SamplingPlan, "_uses_graph", lambda self, device: self.graph is not False)
    monkeypatch.setattr(GraphStore, "running", lambda self, device: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    return captures


def limit(model):
    """Of three steps of two evaluations."""
    return rounding_bound(torch.float32, roundings_of(model.config, 6))


def both(model, eva, noise, **options):
    return (
        SamplingPlan(model, **options)(eva, noise),
        SamplingPlan(model, **options, graph=False)(eva, noise),
    )


@pytest.mark.parametrize("conventions", ["consistent", "published"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("solver", ["euler", "heun", "midpoint", "adams_bashforth2"])
def test_equals_eager_steps(make_model, draw, captured, solver, scale, conventions):
    model = make_model(conventions=conventions)
    for batch in (5, 1, 4):
        eva, noise = draw(model, batch)
        grid = (0.0, 0.1, 0.4, 1.0)
        options = {"steps": 3, "solver": solver, "guidance_scale": scale, "time_grid": grid}
        got, expected = both(model, eva, noise, **options)
        assert relative_error(got, expected) < limit(model)
    assert [len(stepper.state) for stepper in captured] == [6, 1, 4]


def test_one_graph_serves_every_number_of_steps(model, draw, captured, monkeypatch):
    monkeypatch.setattr(graph, "WINDOW", 4)
    for steps in (3, 4, 5, 11, 2):
        eva, noise = draw(model, 3)
        got, expected = both(model, eva, noise, steps=steps)
        assert torch.equal(got, expected)
    assert len(captured) == 1


def test_padding_rows_cannot_reach_real_ones(model, draw, captured, monkeypatch):
    """Whatever stands beyond the batch, the bits of the batch stay."""
    eva, noise = draw(model, 5)
    plan = SamplingPlan(model, steps=3, solver="adams_bashforth2", guidance_scale=2.0)
    expected = plan(eva, noise)
    load = CapturedStep.load

    def poisoned(self, state, context, past):
        load(self, state, context, past)
        held, batch = len(self.stepper.state), len(state)
        assert held > batch
        for rows in (self.stepper.state, *self.stepper.context, self.stepper.past):
            for half in range(len(rows) // held):
                beyond = rows[half * held + batch : (half + 1) * held]
                assert not beyond.any()
                beyond.fill_(torch.nan)

    monkeypatch.setattr(CapturedStep, "load", poisoned)
    # The comparison of the first replay would see the NaN, which equals nothing.
    assert torch.equal(plan(eva, noise), expected)


def test_buffers_are_cleared_between_batches(model, draw, captured):
    eva, noise = draw(model, 6)
    plan = SamplingPlan(model, steps=2)
    plan(eva, noise)
    (stepper,) = captured
    plan(eva[:5], noise[:5])
    assert not stepper.context.keys_values[5:].any() and not stepper.context.stream[5:].any()


@pytest.mark.parametrize("solver", ["heun", "adams_bashforth2"])
def test_micro_batches_share_a_graph(model, draw, captured, solver):
    """With a callback all advance together, each with its own state and slope."""
    eva, noise = draw(model, 5)
    options = {"steps": 3, "solver": solver, "guidance_scale": 2.0}
    expected = SamplingPlan(model, **options, graph=False)(eva, noise)
    seen = []
    got = SamplingPlan(model, **options, working_memory=1)(
        eva, noise, callback=lambda step, x: seen.append(x)
    )
    assert len(captured) == 1 and len(seen) == 3
    assert relative_error(got, expected) < limit(model)
    assert torch.equal(seen[-1], got)


def test_callback_does_not_change_the_result(model, draw, captured):
    eva, noise = draw(model, 3)
    plan = SamplingPlan(model, steps=3)
    expected = plan(eva, noise)
    seen = []
    assert torch.equal(plan(eva, noise, callback=lambda *both: seen.append(both)), expected)
    assert torch.equal(seen[-1][1], expected)


def test_first_replay_is_compared_with_the_eager_step(model, draw, captured, monkeypatch):
    def wrong(stepper, pool):
        stand_in = Calling(stepper, pool)

        def replay():
            stepper.advance()
            stepper.state[0, 0, 0] += 1e-6

        stand_in.replay = replay
        return stand_in

    monkeypatch.setattr(graph, "_capture", wrong)
    eva, noise = draw(model)
    with pytest.raises(RuntimeError, match=r"does not reproduce.*pass graph=False"):
        generate(model, eva, 2, noise=noise)
    assert torch.isfinite(generate(model, eva, 2, noise=noise, graph=False)).all()


def test_at_most_eight_graphs_are_kept(model, draw, captured):
    eva, noise = draw(model, 16)
    for batch in (1, 2, 3, 4, 6, 8, 12, 16):
        SamplingPlan(model, steps=1)(eva[:batch], noise[:batch])
    SamplingPlan(model, steps=1)(eva[:2], noise[:2])
    assert len(captured) == GRAPHS
    SamplingPlan(model, steps=1, solver="euler")(eva[:1], noise[:1])
    SamplingPlan(model, steps=1)(eva[:2], noise[:2])
    assert len(captured) == GRAPHS + 1
    SamplingPlan(model, steps=1)(eva[:1], noise[:1])
    assert len(captured) == GRAPHS + 2


def test_buckets_hold_every_batch():
    for batch in range(1, 129):
        size = bucket(batch)
        assert size in BUCKETS and batch <= size <= max(batch + 1, 1.5 * batch)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("solver", ["euler", "heun", "midpoint", "adams_bashforth2"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_cuda_graph_equals_eager_launches(make_model, draw, dtype, solver, scale):
    model = make_model(hidden_size=64, num_tokens=256, grid=(1, 16, 16)).cuda()
    for batch in (1, 4):
        eva, noise = draw(model, batch)
        options = {"steps": 70, "solver": solver, "guidance_scale": scale, "dtype": dtype}
        got, expected = both(model, eva, noise, **options)
        assert torch.equal(got, expected)


@pytest.mark.gpu
def test_cuda_graphs_in_two_streams(make_model, draw):
    model = make_model(hidden_size=64).cuda()
    eva, noise = draw(model, 4)
    plan = SamplingPlan(model, steps=20)
    expected = plan(eva, noise)
    outputs = []
    for _ in range(4):
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            outputs.append(plan(eva, noise))
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for out in outputs)


@pytest.mark.gpu
def test_inside_another_capture(make_model, draw):
    model = make_model(hidden_size=64).cuda()
    eva, noise = draw(model)
    other = torch.cuda.CUDAGraph()
    with (
        pytest.raises(RuntimeError, match="call it outside the capture"),
        torch.cuda.graph(other),
    ):
        generate(model, eva, 2, noise=noise)


@pytest.mark.gpu
def test_forget_returns_the_memory(make_model, draw):
    model = make_model(hidden_size=64, num_tokens=256, grid=(1, 16, 16)).cuda()
    eva, noise = draw(model, 8)
    generate(model, eva, 2, noise=noise)
    forget(model)
    before = torch.cuda.memory_allocated()
    generate(model, eva, 2, noise=noise)
    assert torch.cuda.memory_allocated() > before
    forget(model)
    assert torch.cuda.memory_allocated() == before
