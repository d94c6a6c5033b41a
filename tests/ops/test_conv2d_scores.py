"""The score ops of a convolution, called directly."""

from __future__ import annotations

import pytest
import torch
from sparsekern.kernels import eager
from sparsekern.kernels.contract import ConvShape

from sparsekern.ops import scores

# A kernel of 1 x 2 over one channel of four pixels 1 2 3 4, and dy = 1 0 10: gradients 31 and 42.
SHAPE = ConvShape(1, 1, (1, 2))
X, DY = torch.tensor([[[[1.0, 2, 3, 4]]]]), torch.tensor([[[[1.0, 0, 10]]]])
ROW, COL = torch.tensor([0], dtype=torch.int32), torch.tensor([1], dtype=torch.int32)
SCORES = {
    "all_block_norms": (lambda dy, x, to: scores.all_block_norms(dy, x, 1, 1, to, SHAPE), [[31.0, 42.0]]),
    "block_norms": (lambda dy, x, to: scores.block_norms(dy, x, ROW, COL, 1, 1, to, SHAPE), [42.0]),
    "sketch": (
        lambda dy, x, to: scores.sketch(dy, x, torch.ones(1, 1), torch.ones(1, 2), 1, 1, to, SHAPE),
        [[[31.0, 42.0]]],
    ),
}


@pytest.mark.parametrize(("score", "expected"), SCORES.values(), ids=SCORES)
def test_by_hand(score, expected):
    assert score(DY, X, "auto").tolist() == expected


@pytest.mark.parametrize("score", [score for score, _ in SCORES.values()], ids=SCORES)
def test_scores_are_not_differentiable_and_say_so(score):
    result = score(DY.clone().requires_grad_(), X, "auto")
    with pytest.raises(RuntimeError, match="block scores are not differentiable"):
        result.sum().backward()


@pytest.mark.parametrize("score", [score for score, _ in SCORES.values()], ids=SCORES)
def test_a_request_that_cannot_be_met_is_refused(score, monkeypatch):
    monkeypatch.setattr(eager, "why_not", lambda *a: "it is switched off")
    with pytest.raises(NotImplementedError, match="'eager' cannot run conv2d: it is switched off"):
        score(DY, X, "eager")
