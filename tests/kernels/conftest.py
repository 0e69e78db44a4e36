"""The same tests judge every implementation: ``IMPL`` of a test module is the one under test.

On the CPU, Triton's kernels run in its interpreter and the CUDA kernels in the emulation of
``tests/csrc``, under the same binding.
"""

import pytest
import torch

from blip3o_fast.ops import Impl, _cuda
from tests.csrc.build import load_host_operators


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a module that names an ``IMPL`` once for each."""
    if hasattr(metafunc.module, "IMPL"):
        metafunc.parametrize("implementation", [Impl.TRITON, Impl.CUDA], ids=str, indirect=True)


@pytest.fixture(autouse=True)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the implementation in its place."""
    if getattr(request, "param", None) is not Impl.CUDA:
        return
    emulated = request.node.callspec.params["device"] == "cpu"
    if emulated:
        load_host_operators()
        monkeypatch.setattr(_cuda, "operators", lambda: torch.ops.blip3o_fast_host)
    elif not _cuda.cuda_build().loaded:
        pytest.skip(_cuda.cuda_build().reason)
    refusal = _cuda.refusal

    def refused(op: str, x: torch.Tensor) -> str:
        if x.dtype is torch.float64:
            pytest.skip("the CUDA kernels take no float64")
        return _cuda.limit(op, x) if emulated else refusal(op, x)

    monkeypatch.setattr(_cuda, "refusal", refused)
    monkeypatch.setattr(request.module, "IMPL", Impl.CUDA)
