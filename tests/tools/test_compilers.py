"""torch.compile of what is a graph and of what is not, torch.export and torch.jit.trace."""

import pytest
import torch

from blip3o_fast import SamplingPlan
from tests.tools.models import build, inputs


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def test_generate_runs_as_it_is():
    model, (x, _, eva) = build(), inputs()
    plan = SamplingPlan(model, steps=2)
    expected = plan(eva, x)
    assert torch.equal(torch.compile(plan, backend="eager")(eva, x), expected)
    generate = torch.compile(model.generate, backend="eager")
    for steps in (2, 2, 3):
        assert torch.equal(generate(eva, steps, noise=x), model.generate(eva, steps, noise=x))

    def program(eva):
        return 2 * model.generate(eva + 1, 2, noise=x)

    assert torch.equal(torch.compile(program, backend="eager")(eva), program(eva))


def test_generate_is_no_graph():
    model, (x, _, eva) = build(), inputs()
    generate = torch.compile(model.generate, backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="generate is no graph: pass compile=True"):
        generate(eva, 2, noise=x)


def test_export():
    model, batch = build(), torch.export.Dim("batch")
    shapes = [{0: batch}] * 3
    with torch.no_grad():
        program = torch.export.export(model, inputs(3), dynamic_shapes=shapes)
        got = program.module()(*inputs(5))
        expected = model(*inputs(5))
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(got[name], x, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("recording", [True, False])
def test_trace(recording):
    model = build()
    with torch.set_grad_enabled(recording):
        traced = torch.jit.trace(model, inputs(3), strict=False)
    got, expected = traced(*inputs(5)), model(*inputs(5))
    for name, x in expected.items():
        torch.testing.assert_close(got[name], x, rtol=1e-5, atol=1e-5)
