"""The profile of an evaluation, and the run of every op that the sanitizer watches."""

from dataclasses import replace
from types import SimpleNamespace

import every_op
import profile_launches as profile
import pytest
import torch

from blip3o_fast.benchmarking import work
from blip3o_fast.benchmarking.shapes import Shape
from blip3o_fast.config import DiTConfig
from blip3o_fast.ops import OPS

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_the_projections_of_an_evaluation_are_found_and_counted():
    shape = Shape("tiny", 1, 16)
    launches = profile.profile_launches("evaluation", shape, "fp32", CPU)
    counted = [(x, profile.count_work(x, shape.config, 1, 4)) for x in launches]
    flops = sum(w.flops * x.calls for x, w in counted if w is not None)
    assert flops == pytest.approx(work.evaluation(shape.config, 1, 4).flops, rel=1e-6)
    assert all(x.seconds > 0 for x in launches)


def test_the_products_of_a_training_step_are_found_and_counted(narrow):
    """Forward and backward, attention's among them."""
    shape = Shape("tiny", 2, 16)
    launches = profile.profile_launches("training", shape, "fp32", CPU)
    counted = [(x, profile.count_work(x, shape.config, 2, 4)) for x in launches]
    flops = sum(w.flops * x.calls for x, w in counted if w is not None)
    assert flops == pytest.approx(profile.total_work("training", shape, 4).flops, rel=0.01)
    backward = [x for x in launches if "flash_att" in x.op and "backward" in x.op]
    assert sum(x.calls for x in backward) == 2 * shape.config.num_hidden_layers


def test_kernels_of_equal_operators_are_added_up():
    def event(*durations):
        kernels = [SimpleNamespace(name=f"kernel{i}", duration=d) for i, d in enumerate(durations)]
        return SimpleNamespace(name="aten::mm", input_shapes=[[8, 4], [4, 2]], kernels=kernels)

    events = [event(10.0, 5.0)] * profile.CALLS * 3
    launch = profile.merge(events, CUDA)
    assert launch.calls == 3 and launch.launches == 6
    assert launch.seconds == pytest.approx(3 * 15e-6)
    assert launch.kernels == ["kernel0", "kernel1"]


@pytest.mark.parametrize(
    "op, shapes, expected",
    [
        (
            "aten::addmm",
            [[6], [8, 4], [4, 6]],
            work.Work(2 * 8 * 4 * 6, (8 * 4 + 4 * 6 + 8 * 6) * 2),
        ),
        ("blip3o_fast::sandwich_join", [[1, 8, 384]], work.Work(0.0, 4 * 8 * 384 * 2)),
        ("blip3o_fast_cuda::rope_", [[1, 8, 640]], work.Work(0.0, 2 * 8 * 640 * 2)),
        ("blip3o_fast::swiglu", [[1, 8, 2048]], work.Work(0.0, 8 * (2048 + 1024) * 2)),
        (
            "blip3o_fast_cuda::rope_attention",
            [[1, 256, 6, 64], [1, 256, 2, 64], [1, 256, 2, 64]],
            work.attention(DiTConfig.preset("tiny"), 1, 2),
        ),
        ("blip3o_fast::swiglu_backward", [[1, 8, 1024]], work.Work(0.0, 5 * 8 * 1024 * 2)),
        # The velocity and its gradient are 16-bit, what it is compared with is fp32.
        ("blip3o_fast::flow_loss_backward", [[1, 8, 64]], work.Work(0.0, 8 * 64 * (2 * 2 + 3 * 4))),
        ("aten::mul", [[8]], None),
    ],
)
def test_work_by_shapes(op, shapes, expected):
    launch = profile.Launch(op, shapes, 1, 1.0, 1)
    assert profile.count_work(launch, DiTConfig.preset("tiny"), 1, 2) == expected


def test_every_op_agrees_with_the_reference_in_fp64(capsys):
    """In both dtypes by the reference; three of them by ATen's passes, which have no gradients."""
    assert every_op.main(["--device", "cpu", "--impl", "reference", "aten"]) == 0
    out = capsys.readouterr().out
    assert out.count("reference: good, ") == 2 * len(OPS)
    assert out.count("aten: good, ") == 2 * sum(op.aten is not None for op in OPS.values())
    assert "swiglu, bf16, aten: not here: " in out


def test_triton_in_its_interpreter_is_compared_as_well(monkeypatch, capsys):
    monkeypatch.setattr(every_op, "OPS", {"swiglu": OPS["swiglu"]})
    assert every_op.main(["--device", "cpu", "--dtype", "fp32"]) == 0
    assert "swiglu, fp32, triton: good" in capsys.readouterr().out


def test_an_op_that_is_wrong_in_its_gradient_alone_is_found(monkeypatch, capsys):
    good = OPS["swiglu"]

    def wrong(x):
        out = good.reference(x)
        return out if x.dtype is torch.float64 else out + (x - x.detach())[..., : out.shape[-1]]

    monkeypatch.setattr(every_op, "OPS", {"swiglu": replace(good, reference=wrong)})
    assert every_op.main(["--device", "cpu", "--impl", "reference"]) == 1
    assert "WRONG" in capsys.readouterr().out
