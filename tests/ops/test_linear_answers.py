"""Which tokens a probe hears; the answers themselves are in test_probes.py."""

from __future__ import annotations

import pytest
import torch
from sparsekern.kernels.contract import LinearShape

from sparsekern.ops.probes import spread


@pytest.mark.parametrize(
    ("tokens", "taken"), [(0, range(7)), (7, range(7)), (9, range(7)), (3, (0, 2, 4)), (2, (0, 3)), (1, (0,))]
)
def test_tokens_are_evenly_spread_and_not_copied(tokens, taken):
    dy, x = torch.arange(14.0).view(7, 2), torch.arange(7.0).view(7, 1)
    found = spread(dy, x, LinearShape(1, 2), tokens)
    assert found[1].flatten().tolist() == list(taken) and torch.equal(found[0], dy[list(taken)])
    assert found[0].data_ptr() == dy.data_ptr() and found[1].data_ptr() == x.data_ptr()
