"""The same tests judge every implementation: ``IMPL`` of a test module is the one under test.

On the CPU, Triton's kernels run in its interpreter and the CUDA kernels in the emulation of
``tests/csrc``, under the same binding.
"""

import pytest
import torch

from blip3o_fast.ops import Impl, Op, _dispatch, cuda_build
from tests.csrc.build import emulate_cuda


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a module that names an ``IMPL`` once for each."""
    if hasattr(metafunc.module, "IMPL"):
        metafunc.parametrize("implementation", [Impl.TRITON, Impl.CUDA], ids=str, indirect=True)


@pytest.fixture(autouse=True)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the implementation in its place."""
    if getattr(request, "param", None) is not Impl.CUDA:
        return
    if request.node.callspec.params["device"] == "cpu":
        emulate_cuda(monkeypatch)
    elif not cuda_build().loaded:
        pytest.skip(cuda_build().reason)
    refusal = _dispatch._cuda_refusal

    def refused(op: Op, x: torch.Tensor) -> str | None:
        if x.dtype is torch.float64:
            pytest.skip("the CUDA kernels take no float64")
        return refusal(op, x)

    monkeypatch.setattr(_dispatch, "_cuda_refusal", refused)
    monkeypatch.setattr(request.module, "IMPL", Impl.CUDA)
