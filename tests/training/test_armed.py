"""Armed probes: what they hear, and in how many backwards."""

from __future__ import annotations

import pytest
import torch

import sparsekern as sk
from sparsekern.ops import Probe
from sparsekern.training.armed import ArmedProbes

LAYER = sk.SparseLinear(8, 8, block_size=4, sparsity=0.5, seed=0)


def armed(kind: str) -> ArmedProbes:
    armed = ArmedProbes({"fc": LAYER})
    armed.arm("fc", Probe.all_norms(LAYER.grid) if kind == "norms" else Probe.magnitudes(LAYER.grid))
    return armed


def backward(seed: int) -> None:
    LAYER(torch.randn(3, 8, generator=torch.Generator().manual_seed(seed))).square().sum().backward()


@pytest.mark.parametrize(("kind", "backwards"), [("norms", [0, 1, 2]), ("magnitudes", [1, 1, 1])])
def test_backwards_are_counted_where_answers_do_not_add_up(kind, backwards):
    probes, counted = armed(kind), []
    for seed in range(3):
        (answer,) = probes.answers(None).values()
        counted.append(answer.backwards)
        assert bool(answer.value.any()) == (seed > 0), "nothing was heard before the first"
        backward(seed)
    assert counted == backwards
    probes.clear("fc")
    (answer,) = probes.answers(None).values()
    assert answer.backwards == backwards[0] and not answer.value.any()
    probes.disarm()
    assert LAYER.probe is None and probes.answers(None) == {}


@pytest.mark.parametrize("kind", ["norms", "magnitudes"])
def test_what_was_heard_can_be_taken_up_again(kind):
    through = armed(kind)
    backward(0)
    backward(1)
    expected = through.answers(None)["fc"]
    first = armed(kind)
    backward(0)
    ((heard, backwards),) = first.heard().values()
    second = armed(kind)
    second.resume("fc", heard.clone(), backwards)
    backward(1)
    found = second.answers(None)["fc"]
    assert torch.equal(found.value, expected.value) and found.backwards == expected.backwards
    second.disarm()
