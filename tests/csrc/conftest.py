"""The kernels on the host, through ctypes."""

import pytest

from tests.csrc.build import emulated_kernels
from tests.csrc.interface import Kernels, load


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    """Every kernel, run on the host."""
    return Kernels(load(emulated_kernels()))
