"""The captured step: buckets, windows, sharing. On the CPU a graph that calls stands in."""

import pytest
import torch
from golden_data import relative_error
from rounding import rounding_bound, roundings_of

from blip3o_fast import SamplingPlan, fit_solver, generate
from blip3o_fast.errors import NonFiniteSamples
from blip3o_fast.flow import SOLVERS, Trajectory
from blip3o_fast.sampling import cache, forget, graph
from blip3o_fast.sampling.graph import BUCKETS, GRAPHS, WARM_UP, Captured, bucket
from tests.rehearsal.streams import Device, Stream


def engines(model):
    return cache._ENGINES[model].engines.values.values()


@pytest.fixture
def streams(monkeypatch):
    """Streams and graphs without a device; plans on the CPU go through them."""
    device = Device()
    device.install(lambda *what: monkeypatch.setattr(*what, raising=False))
    monkeypatch.setattr(SamplingPlan, "_uses_graph", lambda self, device: self.graph is not False)
    return device


class Calling:
    """Replays by evaluating again."""

    def __init__(self, trajectory):
        self.replay = trajectory.advance


@pytest.fixture
def captured(monkeypatch, streams):
    """Plans on the CPU go through buckets, windows and buffers; every capture is listed."""
    captures = []

    def capture(trajectory, pool, stream):
        captures.append(trajectory)
        return Calling(trajectory)

    monkeypatch.setattr(graph, "_capture", capture)
    return captures


def limit(model):
    """Of three steps of four evaluations."""
    return rounding_bound(torch.float32, roundings_of(model.config, 12))


def both(model, eva, noise, **options):
    return (
        SamplingPlan(model, **options)(eva, noise),
        SamplingPlan(model, **options, graph=False)(eva, noise),
    )


@pytest.mark.parametrize("conventions", ["consistent", "published"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("solver", SOLVERS)
def test_equals_eager_evaluations(make_model, draw, captured, solver, scale, conventions):
    model = make_model(conventions=conventions)
    for batch in (5, 1, 4):
        eva, noise = draw(model, batch)
        grid = (0.0, 0.1, 0.4, 1.0)
        options = {"steps": 3, "solver": solver, "guidance_scale": scale, "time_grid": grid}
        got, expected = both(model, eva, noise, **options)
        assert relative_error(got, expected) < limit(model)
    assert [len(trajectory.x) for trajectory in captured] == [6, 1, 4]


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_fitted_solver_is_replayed(model, draw, captured, scale):
    """Each evaluation reads other coefficients; the graph is one."""
    known, _ = draw(model, 4)
    fitted = fit_solver(model, known, evaluations=5, guidance_scale=scale)
    captured.clear()
    for batch in (3, 2):
        eva, noise = draw(model, batch)
        got, expected = both(model, eva, noise, solver=fitted, guidance_scale=scale)
        assert torch.equal(got, expected)
    assert len({len(trajectory.x) for trajectory in captured}) == len(captured)
    assert all(len(trajectory.slopes) == 4 for trajectory in captured)


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
    load = Captured.load

    def poisoned(self, x, slopes, context):
        load(self, x, slopes, context)
        held, batch = len(self.trajectory.x), len(x)
        assert held > batch
        for rows in (self.trajectory.x, *self.context, *self.trajectory.slopes):
            for half in range(len(rows) // held):
                beyond = rows[half * held + batch : (half + 1) * held]
                assert not beyond.any()
                beyond.fill_(torch.nan)

    monkeypatch.setattr(Captured, "load", poisoned)
    assert torch.equal(plan(eva, noise), expected)


def test_buffers_are_cleared_between_batches(model, draw, captured):
    eva, noise = draw(model, 6)
    plan = SamplingPlan(model, steps=2)
    plan(eva, noise)
    (trajectory,) = captured
    plan(eva[:5], noise[:5])
    context = trajectory.velocity.context
    assert not context.keys_values[5:].any() and not context.stream[5:].any()


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
    def wrong(trajectory, pool, stream):
        stand_in = Calling(trajectory)

        def replay():
            trajectory.advance()
            trajectory.x[0, 0, 0] += 1e-6

        stand_in.replay = replay
        return stand_in

    monkeypatch.setattr(graph, "_capture", wrong)
    eva, noise = draw(model)
    with pytest.raises(RuntimeError, match=r"does not reproduce.*pass graph=False"):
        generate(model, eva, 2, noise=noise)
    assert torch.isfinite(generate(model, eva, 2, noise=noise, graph=False)).all()


def test_a_step_that_gives_nan_reproduces(model, draw, captured):
    """As without a graph: the model is blamed for what is not a number, not the graph."""
    torch.nn.init.constant_(model.output_proj.bias, torch.nan)
    eva, noise = draw(model)
    for solver in ("heun", "adams_bashforth2"):
        with pytest.raises(NonFiniteSamples, match="the weights of the model"):
            SamplingPlan(model, steps=2, solver=solver)(eva, noise)
    assert captured


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


def test_a_capture_has_workspaces_of_its_own(model, draw, streams, monkeypatch):
    """Those that warm-up left are forgotten just before a capture, its own just after it."""
    advance = Trajectory.advance

    def told(self):
        streams.told.append("advance")
        advance(self)

    monkeypatch.setattr(Trajectory, "advance", told)
    monkeypatch.setattr(graph, "_replay_verified", lambda trajectory, graph: graph.replay())
    eva, noise = draw(model, 4)
    plan = SamplingPlan(model, steps=2)
    capture = [*["advance"] * WARM_UP, "forget", "begin", "advance", "end", "forget"]
    plan(eva, noise)
    assert streams.told == [*capture, *["replay"] * 4]
    streams.told.clear()
    plan(eva[:1], noise[:1])
    assert streams.told == [*capture, *["replay"] * 4]


def test_without_the_means_to_forget_workspaces(model, draw, streams, monkeypatch):
    monkeypatch.delattr(torch._C, "_cuda_clearCublasWorkspaces")
    eva, noise = draw(model)
    with pytest.raises(RuntimeError, match=r"expected torch._C._cuda_clear.*pass graph=False"):
        generate(model, eva, 2, noise=noise)


def test_one_stream_for_all_captures(model, draw, streams, monkeypatch):
    """Memory of the pool is reused on the stream that it was made on alone."""
    monkeypatch.setattr(graph, "_replay_verified", lambda trajectory, graph: graph.replay())
    eva, noise = draw(model, 4)
    for batch, solver in ((1, "heun"), (4, "heun"), (4, "euler")):
        SamplingPlan(model, steps=1, solver=solver)(eva[:batch], noise[:batch])
    (own,) = engines(model)
    graphs = [captured.graph for captured in own.graphs.captured.values()]
    assert len(graphs) == 3
    assert {graph.stream for graph in graphs} == {own.graphs.stream}
    assert len({graph.pool for graph in graphs}) == 1


def test_a_failed_capture_leaves_the_thread_on_its_stream(model, draw, streams):
    """Its pool, to which torch goes on recording, serves no other capture."""
    eva, noise = draw(model, 1)
    streams.fails = RuntimeError("capture invalidated")
    with pytest.raises(RuntimeError, match=r"a CUDA graph failed \(capture invalidated\)"):
        SamplingPlan(model, steps=1)(eva, noise)
    assert streams.current is streams.default
    assert streams.told == ["forget", "begin", "forget"]
    (own,) = engines(model)
    assert own.graphs.pool is None and not own.graphs.captured


def test_freed_buffers_serve_nobody_before_their_last_use(model, draw, streams, monkeypatch):
    """The allocator hands memory to the stream that it was made on, which therefore has to wait."""
    monkeypatch.setattr(graph, "_replay_verified", lambda trajectory, graph: graph.replay())
    homes, make = [], Trajectory.__init__

    def made(self, *args, **options):
        homes.append(streams.current)
        make(self, *args, **options)

    monkeypatch.setattr(Trajectory, "__init__", made)
    eva, noise = draw(model, 1)
    plan = SamplingPlan(model, steps=2)
    plan(eva, noise)
    other = Stream()
    streams.set_stream(other)
    plan(eva, noise)
    (home,) = homes
    assert other.work == 4 and home.follows(other) and not streams.default.follows(other)


def test_buckets_hold_every_batch():
    for batch in range(1, 129):
        size = bucket(batch)
        assert size in BUCKETS and batch <= size <= max(batch + 1, 1.5 * batch)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("solver", SOLVERS)
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
