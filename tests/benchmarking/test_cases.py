"""Cases: what is run computes what it should, on tensors that rotate."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from blip3o_fast import ops
from blip3o_fast.benchmarking import network_cases
from blip3o_fast.benchmarking import op_cases as op_module
from blip3o_fast.benchmarking.attention_cases import attention_cases
from blip3o_fast.benchmarking.block_cases import block_cases
from blip3o_fast.benchmarking.cases import TOLERANCE, Disagreement, check_agreement
from blip3o_fast.benchmarking.network_cases import (
    Network,
    evaluation_cases,
    generate_cases,
    graphed,
    hoisted,
    plain,
)
from blip3o_fast.benchmarking.op_cases import op_cases
from blip3o_fast.benchmarking.shapes import Shape
from blip3o_fast.benchmarking.watch import CPU_ROTATION
from blip3o_fast.benchmarking.work import Work
from blip3o_fast.ops import OPS, Impl
from blip3o_fast.sampling.hoisted import HoistedVelocity

CPU = torch.device("cpu")
SHAPE = Shape("tiny", 1, 16)


def test_agreement_looks_at_every_tensor():
    a, b = torch.ones(3), torch.full((2,), 2.0)
    check_agreement("it", (a, None, [b]), [a, b])
    with pytest.raises(Disagreement, match=r"it: expected the reference up to 0\.0001.*got 0\.5"):
        check_agreement("it", (a, 1.5 * b), (a, b))
    with pytest.raises(Disagreement, match="expected 2 tensors, got 1"):
        check_agreement("it", (a, None), (a, b))
    with pytest.raises(Disagreement, match=r"expected the shape \[3\] of the reference, got \[2\]"):
        check_agreement("it", b, a)
    with pytest.raises(Disagreement, match="got nan"):
        check_agreement("it", torch.full((3,), torch.nan), a)


def test_the_coarser_dtype_allows_more():
    exact = torch.ones(4)
    near = exact * 1.01
    check_agreement("it", near, exact.bfloat16())
    with pytest.raises(Disagreement):
        check_agreement("it", near, exact)


def test_every_op_has_its_directions():
    tasks = [case.task for case in op_cases(SHAPE, "fp32", CPU, compiled=False)]
    expected = [
        name
        for op in OPS.values()
        if not op.combines
        for name in (op.name, f"{op.name} backward")[: 1 + (op.backward is not None)]
    ]
    *single, product = tasks
    assert [task.name for task in single] == expected and "swiglu backward" in expected
    assert product.name == "gate_up + swiglu"
    assert {(task.group, task.shape, task.dtype) for task in tasks} == {
        ("ops", "tiny-b1-n16", "fp32")
    }
    assert all(task.work.bytes > 0 and task.work.flops == 0 for task in single)
    # 16 tokens of tiny, D = 384 and I = 1024, in fp32.
    rows, weights = 16 * (384 + 1024), 2 * 1024 * 384
    assert product.work == Work(2 * 16 * weights, 4 * (rows + weights))


@pytest.mark.parametrize("capability, runs", [((9, 0), True), ((8, 0), False)])
def test_a_kernel_that_cannot_run_is_left_out_and_says_why(monkeypatch, capability, runs):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(op_module, "rotation_bytes", lambda device: 1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        *_, case = op_cases(SHAPE, "bf16", torch.device("cuda"), compiled=False)
        one = {c.name: c for c in case.contenders if c.name.startswith("one kernel")}
        assert len(one) == (4 if runs else 1) and one["one kernel"].ours is runs
        if not runs:
            with pytest.raises(ValueError, match=r"needs compute capability 9 or 10, got 8\.0"):
                one["one kernel"].prepare()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_ops_are_ready_to_be_timed(dtype, monkeypatch):
    monkeypatch.setattr(op_module, "MOST_COPIES", 2)
    for case in op_cases(SHAPE, dtype, CPU, compiled=False):
        op = OPS.get(case.task.name)
        inference = op is not None and op.aten is not None
        names = ["reference", "aten"] if inference else ["reference"]
        assert [(c.name, c.ours) for c in case.contenders] == [(name, True) for name in names]
        for contender in case.contenders:
            prepared = contender.prepare()
            assert prepared.warm and len(prepared.calls) == 2
            first, second = (call() for call in prepared.calls)
            first, second = (x[0] if isinstance(x, tuple) else x for x in (first, second))
            assert not torch.equal(first, second), "both calls read the same tensors"


def test_calls_rotate_over_more_than_the_caches_hold():
    shape = Shape("base")
    case = next(iter(op_cases(shape, "fp32", CPU, compiled=False)))
    prepared = case.contenders[0].prepare()
    assert prepared.rotation > CPU_ROTATION
    assert prepared.rotation / len(prepared.calls) < CPU_ROTATION


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_contender_that_computes_something_else_is_refused(backward, monkeypatch):
    def wrong(gate_up):
        result = OPS["swiglu"].reference(gate_up)
        # The value of swiglu with twice its gradient, or twice its value.
        return 2 * result - result.detach() if backward else 2 * result

    names = [("theirs", wrong, False)]
    monkeypatch.setattr(op_module, "OPS", {"swiglu": OPS["swiglu"]})
    monkeypatch.setattr(op_module, "implementations", lambda *_, **__: names)
    cases = {case.task.name: case for case in op_cases(SHAPE, "fp32", CPU, compiled=False)}
    case = cases["swiglu backward" if backward else "swiglu"]
    with pytest.raises(Disagreement, match="swiglu by theirs: expected the reference"):
        case.contenders[0].prepare()


def test_attention_by_every_backend():
    forward, backward, with_rope = attention_cases(SHAPE, "fp32", CPU)
    assert backward.task.work.flops == 2 * forward.task.work.flops
    for case in (forward, backward):
        assert {c.name for c in case.contenders} >= {"sdpa", "reference"}
        assert [c.ours for c in case.contenders].count(True) == 1
        for contender in case.contenders:
            contender.prepare().calls[0]()
    assert with_rope.task.work == forward.task.work
    assert [c.name for c in with_rope.contenders] == ["reference", "rope, then attention"]
    for contender in with_rope.contenders:
        contender.prepare().calls[0]()


def test_a_block_takes_turns_with_the_other_blocks():
    (case,) = block_cases(SHAPE, "fp32", CPU, compiled=False)
    prepared = case.contenders[0].prepare()
    results = [call()[0] for call in prepared.calls]
    assert len(results) == SHAPE.config.num_hidden_layers
    assert not torch.equal(results[0], results[1])
    assert prepared.rotation > 4 * len(results) * 768


def test_an_evaluation_is_the_same_hoisted_or_not():
    network = Network(SHAPE, "bf16", CPU)
    for prepared in (plain(network, None), hoisted(network, None)):
        check_agreement("velocity", prepared.calls[0](), network.velocity())
    assert network.get()[0].impls == ops.ImplTable()


def test_a_wrong_evaluation_is_refused(monkeypatch):
    network = Network(SHAPE, "fp32", CPU)
    right = HoistedVelocity.__call__
    monkeypatch.setattr(HoistedVelocity, "__call__", lambda *args: 1.01 * right(*args))
    with pytest.raises(Disagreement, match="evaluation, hoisted: expected the reference"):
        hoisted(network, None)


def test_fp8_is_checked_against_the_reference(monkeypatch):
    network = Network(SHAPE, "bf16", CPU)
    prepared = hoisted(network, Impl.REFERENCE, torch.float8_e4m3fn)
    assert prepared.calls[0]().shape == (1, 16, 1024)
    monkeypatch.setattr("blip3o_fast.benchmarking.network_cases.FP8_TOLERANCE", 0.0)
    with pytest.raises(Disagreement, match=r"expected the reference up to 0\.03"):
        hoisted(network, Impl.REFERENCE, torch.float8_e4m3fn)


def test_contenders_of_an_evaluation():
    def names(**options):
        (case,) = evaluation_cases(SHAPE, "fp32", CPU, **options)
        return {contender.name: contender.ours for contender in case.contenders}

    assert names(compiled=False) == {"plan": True, "nothing hoisted": True}
    peers = {"torch.compile": False, "torch.compile, hoisted": False, "published": False}
    assert names(compiled=True, published=lambda _: lambda: None) == {
        **names(compiled=False),
        **peers,
    }


def test_contenders_on_a_gpu(monkeypatch):
    monkeypatch.setattr("blip3o_fast.ops.e4m3_refusal", lambda device: None)
    monkeypatch.setattr(network_cases, "has_impl", lambda *_: True)
    (case,) = evaluation_cases(SHAPE, "bf16", torch.device("cuda"), compiled=False)
    ours = [contender.name for contender in case.contenders if contender.ours]
    fp8 = ["plan, FP8", "plan, FP8, CUDA graph"]
    graphs = ["plan, CUDA graph", "plan, CUDA graph, rope in attention"]
    assert ours == ["plan", "nothing hoisted", *graphs, *fp8]


def test_one_kernel_for_rotation_and_attention_is_used_and_agrees(monkeypatch, emulated_cuda):
    monkeypatch.setattr(network_cases, "GRAPHED_STEPS", 1)
    network = Network(SHAPE, "bf16", CPU)
    one, two = (
        graphed(network, **impls).calls[0]() for impls in ({"rope_attention": Impl.CUDA}, {})
    )
    check_agreement("one kernel", one, two, TOLERANCE[torch.bfloat16])
    assert len(emulated_cuda) == 2 * SHAPE.config.num_hidden_layers
    assert network.get()[0].impls == ops.ImplTable()


def test_a_translation_counts_its_evaluations():
    (case,) = generate_cases(SHAPE, "fp32", CPU, steps=2)
    assert case.task.name == "2-step Heun"
    (contender,) = case.contenders
    clip = contender.prepare().calls[0]()
    assert clip.shape == (1, 16, 1024)
    (case,) = generate_cases(SHAPE, "fp32", CPU, steps=2, eager=True)
    assert [contender.name for contender in case.contenders] == ["plan", "plan, no graph"]
