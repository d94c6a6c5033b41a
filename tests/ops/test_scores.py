"""The score ops, called directly."""

from __future__ import annotations

import pytest
import torch

from sparsekern import ops

DY = torch.arange(12.0).view(2, 6) - 5  # two tokens, six outputs: 3 block rows of 2
X = torch.arange(8.0).view(2, 4) - 3  # four inputs: 1 block column of 3, 1 of 1
G = DY.T @ X
ROW, COL = torch.tensor([2, 0], dtype=torch.int32), torch.tensor([1, 0], dtype=torch.int32)


def test_against_the_dense_gradient():
    whole = torch.stack(
        [torch.stack([G[2 * r : 2 * r + 2, c].norm() for c in (slice(0, 3), slice(3, 4))]) for r in range(3)]
    )
    torch.testing.assert_close(ops.all_block_norms(DY, X, 2, 3, "auto"), whole)
    torch.testing.assert_close(ops.block_norms(DY, X, ROW, COL, 2, 3, "auto"), whole[ROW.long(), COL.long()])
    ones = ops.sketch(DY, X, torch.ones(1, 6), torch.ones(1, 4), 2, 3, "auto")
    torch.testing.assert_close(ones[0], torch.stack([G[:, :3].sum(1), G[:, 3]], 1).view(3, 2, 2).sum(1))


@pytest.mark.parametrize(
    "score",
    [
        lambda dy, x: ops.all_block_norms(dy, x, 2, 3, "auto"),
        lambda dy, x: ops.block_norms(dy, x, ROW, COL, 2, 3, "auto"),
        lambda dy, x: ops.sketch(dy, x, torch.ones(1, 6), torch.ones(1, 4), 2, 3, "auto"),
    ],
    ids=["all_block_norms", "block_norms", "sketch"],
)
def test_scores_are_not_differentiable_and_say_so(score):
    result = score(DY.clone().requires_grad_(), X)
    with pytest.raises(RuntimeError, match="block scores are not differentiable"):
        result.sum().backward()


def test_an_unknown_request_is_refused_by_the_op(monkeypatch):
    from sparsekern.kernels import eager

    monkeypatch.setattr(eager, "why_not", lambda *a: "it is switched off")
    with pytest.raises(NotImplementedError, match="'eager' cannot run linear: it is switched off"):
        ops.all_block_norms(DY, X, 2, 3, "eager")
