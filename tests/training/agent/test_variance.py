"""The ratio of variances, on series whose variances are known."""

from __future__ import annotations

import pytest
import torch

from sparsekern.training.agent.variance import SAMPLED, VarianceRatio

CPU = torch.device("cpu")


def test_every_nth_element_of_all_is_taken_once():
    ratio = VarianceRatio({"a": 5000, "b": 3, "c": 9000}, CPU)
    whole = torch.arange(14003.0)
    a, b, c = whole.split([5000, 3, 9000])
    sample = torch.cat([ratio.sample("a", a), ratio.sample("b", b), ratio.sample("c", c.view(90, 100))])
    assert torch.equal(sample, whole[:: ratio.stride]) and ratio.stride % 2 == 1 and len(sample) <= SAMPLED
    assert torch.equal(ratio.sample("c", None), torch.zeros_like(ratio.sample("c", c)))


def test_a_known_ratio_whose_mean_drifts():
    ratio, generator = VarianceRatio({"a": 100}, CPU), torch.Generator().manual_seed(0)
    assert ratio.value() == 1
    for step in range(300):
        mean = torch.full((100,), 0.01 * step)
        ratio.add(mean + 0.5 * torch.randn(100, generator=generator), mean + torch.randn(100, generator=generator))
    assert ratio.value() == pytest.approx(0.25, rel=0.03)
    state = ratio.state_dict()
    ratio.restart()
    assert ratio.value() == pytest.approx(0.25, rel=0.03)  # until two more steps say otherwise
    ratio.load_state_dict(state)
    ratio.add(torch.ones(100) * torch.inf, torch.ones(100))
    assert ratio.value() == pytest.approx(0.25, rel=0.03)


def test_a_step_without_predecessor_says_nothing():
    ratio = VarianceRatio({"a": 4}, CPU)
    ratio.add(torch.zeros(4), torch.zeros(4))
    ratio.skip()
    ratio.add(torch.ones(4) * 9, torch.ones(4))
    assert ratio.value() == 1
    ratio.add(torch.ones(4) * 9 + 2, torch.ones(4) + 1)
    assert ratio.value() == 4
