"""The shape check and its message."""

import numpy as np
import pytest
import torch

from blip3o_fast.axes import check_shape


def test_accepts():
    check_shape("x", torch.zeros(2, 3, 4), "B N C", C=4)
    check_shape("x", torch.zeros(0, 3), "B N")


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4, 5), (2, 3, 5)])
def test_refuses(shape):
    with pytest.raises(ValueError, match=r"x: expected shape \[B, N, C=4\], got"):
        check_shape("x", torch.zeros(shape), "B N C", C=4)


@pytest.mark.parametrize("x", [np.zeros((2, 3, 4)), 0.5, [1.0]], ids=["numpy", "number", "list"])
def test_what_is_no_tensor(x):
    kind = type(x).__name__
    with pytest.raises(ValueError, match=rf"x: expected a tensor of shape \[B, N\], got {kind}"):
        check_shape("x", x, "B N")
