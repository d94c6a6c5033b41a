"""The score ops of both geometries, called directly."""

from __future__ import annotations

import pytest
import torch
from sparsekern.kernels import eager
from sparsekern.kernels.contract import ConvShape

from sparsekern import ops

# Two tokens, six outputs in 3 block rows of 2; four inputs in 2 block columns, of 3 and of 1.
DY, X = torch.arange(12.0).view(2, 6) - 5, torch.arange(8.0).view(2, 4) - 3
G = DY.T @ X
NORMS = torch.stack(
    [torch.stack([G[2 * r : 2 * r + 2, c].norm() for c in (slice(0, 3), slice(3, 4))]) for r in range(3)]
)
ROW, COL = torch.tensor([2, 0], dtype=torch.int32), torch.tensor([1, 0], dtype=torch.int32)
SUMS = torch.stack([G[:, :3].sum(1), G[:, 3]], 1).view(3, 2, 2).sum(1)

# A kernel of 1 x 2 over one channel of four pixels 1 2 3 4, and dy = 1 0 10: gradients 31 and 42.
SHAPE, IMAGE, DIMAGE = ConvShape(1, 1, (1, 2)), torch.tensor([[[[1.0, 2, 3, 4]]]]), torch.tensor([[[[1.0, 0, 10]]]])
GRADIENTS = torch.tensor([[31.0, 42.0]])

SCORES = {
    "all_block_norms": (lambda dy, x, to: ops.all_block_norms(dy, x, 2, 3, to), DY, X, NORMS),
    "block_norms": (lambda dy, x, to: ops.block_norms(dy, x, ROW, COL, 2, 3, to), DY, X, NORMS[[2, 0], [1, 0]]),
    "sketch": (
        lambda dy, x, to: ops.sketch(dy, x, torch.ones(1, 6), torch.ones(1, 4), 2, 3, to),
        *(DY, X, SUMS[None]),
    ),
    "all_block_norms of a convolution": (
        lambda dy, x, to: ops.all_block_norms(dy, x, 1, 1, to, SHAPE),
        *(DIMAGE, IMAGE, GRADIENTS),
    ),
    "block_norms of a convolution": (
        lambda dy, x, to: ops.block_norms(dy, x, ROW[1:], COL[:1], 1, 1, to, SHAPE),
        *(DIMAGE, IMAGE, GRADIENTS[0, 1:]),
    ),
    "sketch of a convolution": (
        lambda dy, x, to: ops.sketch(dy, x, torch.ones(1, 1), torch.ones(1, 2), 1, 1, to, SHAPE),
        *(DIMAGE, IMAGE, GRADIENTS[None]),
    ),
}
each = pytest.mark.parametrize(("score", "dy", "x", "expected"), SCORES.values(), ids=SCORES)


@each
def test_by_the_dense_gradient(score, dy, x, expected):
    torch.testing.assert_close(score(dy, x, "auto"), expected)


@each
def test_scores_are_not_differentiable_and_say_so(score, dy, x, expected):
    result = score(dy.clone().requires_grad_(), x, "auto")
    with pytest.raises(RuntimeError, match="block scores are not differentiable"):
        result.sum().backward()


@each
def test_a_request_that_cannot_be_met_is_refused(score, dy, x, expected, monkeypatch):
    monkeypatch.setattr(eager, "why_not", lambda *a: "it is switched off")
    with pytest.raises(NotImplementedError, match="'eager' cannot run (linear|conv2d): it is switched off"):
        score(dy, x, "eager")
