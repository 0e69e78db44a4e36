"""Any shape, dtype and layout: drawn ones, against the fp64 reference."""

import functools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blip3o_fast import ops
from tests.kernels.oracle import check, laid_out
from tests.ops.cases import CASES, label

LAYOUTS = ("contiguous", "sliced", "spread", "halves", "transposed", "expanded")


@pytest.mark.parametrize("case", CASES, ids=label)
@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 9),
    width=st.integers(5, 40),  # in narrower rows the norm's gradient is all cancellation
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    layout=st.sampled_from(LAYOUTS),
)
def test_drawn(device, case, batch, tokens, width, dtype, layout):
    values = case.inputs(batch, tokens, width, dtype, device)
    values = [laid_out(x, layout) if x.dim() == 3 else x for x in values]
    if case.name == "flow_loss":
        # Cosines are taken from 1 and are judged at that magnitude in tests/kernels.
        values = [values[0], *(x.float() for x in values[1:])]
    check(
        functools.partial(case.call, impl=ops.Impl.TRITON),
        functools.partial(case.call, impl=ops.Impl.REFERENCE),
        values,
        differentiable=range(case.differentiable),
    )
