from __future__ import annotations

import pytest
import torch
from sparsekern.kernels.contract import ConvShape

from sparsekern.ops.geometry import channels_last, pack, unpack


def test_a_shape_comes_back():
    shape = ConvShape(6, 10, (3, 5), (2, 1), (1, 2, 3, 4), (7, 8), 2)

    assert pack(shape) == [6, 10, 3, 5, 2, 1, 1, 2, 3, 4, 7, 8, 2]
    assert unpack(pack(shape)) == shape


@pytest.mark.parametrize("size", [(2, 3, 4, 5), (1, 1, 4, 5), (2, 3, 1, 1), (0, 3, 4, 5), (2, 1, 4, 1)])
def test_channels_last_is_what_kernels_may_assume(size):
    for x in (
        torch.randn(size),
        torch.randn(size).contiguous(memory_format=torch.channels_last),
        torch.randn(()).expand(size),
        torch.randn(*size, 2)[..., 0],
    ):
        assert channels_last(x).permute(0, 2, 3, 1).is_contiguous()
        assert torch.equal(channels_last(x), x)


def test_what_is_channels_last_is_not_copied():
    x = torch.randn(2, 4, 5, 3).permute(0, 3, 1, 2)

    assert channels_last(x) is x
