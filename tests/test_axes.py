"""The shape check and its message."""

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
