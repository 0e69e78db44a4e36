"""Host cost of a call by Triton and by CUDA C++, in a process where Triton compiles.

``python -m tests.csrc.host_cost`` prints a line of JSON for each op: microseconds of a call with
gradients off. The operators of the build are those that were compiled for the host, on no rows, so
that no kernel runs; Triton's are on one row with a driver that launches nothing. What remains of
both is all that the host does but the launch itself.
"""

import json
import sys
from dataclasses import replace

import host_cost
import pytest
import torch
from triton.runtime import driver

from blip3o_fast.ops import OPS, Impl, Sizes, _dispatch
from tests.csrc.build import emulate_cuda

CALLS = 2000
HALF = replace(host_cost.BASE, parameter_dtype=torch.bfloat16)


def main() -> None:
    """Measure every op that has both."""
    emulate_cuda(pytest.MonkeyPatch())
    driver.set_active(host_cost.STUB_DRIVER)
    _dispatch.interpreting = lambda: True
    for op in OPS.values():
        if op.triton and op.cuda is not None:
            sys.stdout.write(json.dumps({"op": op.name, **measured(op, HALF)}) + "\n")


def measured(op, sizes: Sizes) -> dict[str, float]:
    """Both, in turns."""
    one, none = op.specimens(sizes)[0], op.specimens(replace(sizes, batch=0))[0]
    with torch.no_grad():
        return host_cost.times(
            {
                "triton": lambda: op(*one, impl=Impl.TRITON),
                "cuda": lambda: op(*none, impl=Impl.CUDA),
            },
            CALLS,
        )


if __name__ == "__main__":
    main()
