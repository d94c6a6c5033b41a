"""Bytes on a device and bytes that it sends, against numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.analysis.plan import Layout, Step, Updates, memory, trace, traffic
from sparsekern.errors import InputError

VALUES, BIAS = 9 * 256 * 4, 64 * 4
"""Bytes of a layer of 9 of 16 blocks of 16 x 16."""


@pytest.fixture(scope="module")
def found():
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
        sk.sparsify_(model, 0.4375, 16)
    x = torch.empty(8, 64, device="meta")
    return trace(Step(model, x, lambda m, x: m(x).sum(), lambda m: torch.optim.SGD(m.parameters(), momentum=0.9)))


def test_a_single_device_holds_everything(found):
    held = memory(found, Layout())
    assert held.values == held.optimizer == held.gradients == 3 * (VALUES + BIAS)
    assert (held.communication, held.step) == (0, found.peak())
    assert held.total == held.values + held.optimizer + held.index + held.step


def test_ddp_holds_everything_and_buckets(found):
    held, alone = memory(found, Layout("ddp", 4)), memory(found, Layout())
    assert held.communication == 3 * (VALUES + BIAS)
    assert held.total == alone.total + held.communication


def test_fsdp2_shards_slots_as_torch_chunk_does(found):
    held = memory(found, Layout("fsdp2", 4, ("0", "1")))
    rows = 3  # of 9 slots on 4 devices: 3, 3, 3, 0
    assert held.values == held.optimizer == held.gradients == 3 * (rows * 1024 + BIAS // 4)
    layer = VALUES + BIAS
    assert held.communication == (1 + 2 + 1) * layer  # outside of blocks, two blocks, the gradients of one
    assert held.index == memory(found, Layout()).index


def test_more_devices_than_slots(found):
    assert memory(found, Layout("fsdp2", 512)).values == 3 * (1024 + 4)


def test_accumulated_gradients_are_there_throughout(found):
    more, once = memory(found, Layout(), accumulate=2), memory(found, Layout())
    assert more.step - once.step == max(o for _, o in found.peaks) + once.gradients - found.peak() >= 0


def test_one_device_sends_nothing(found):
    sent = traffic(found.parameters, Layout("ddp", 1), Updates(every=100, moved=0.3))
    assert (sent.step, sent.moves) == (0, 0)


def test_ddp_adds_gradients_up(found):
    sent = traffic(found.parameters, Layout("ddp", 4), Updates())
    assert sent.gradients == sent.step == 2 * 3 * 3 * (VALUES + BIAS) // 4
    assert traffic(found.parameters, Layout("ddp", 4), Updates(), accumulate=8) == sent


def test_fsdp2_gathers_blocks_twice_and_scatters_gradients(found):
    layout, layer = Layout("fsdp2", 2, ("0", "1")), 10 * 1024 + BIAS  # 9 slots are padded to 5 on each
    sent = traffic(found.parameters, layout, Updates())
    assert (sent.gathers, sent.gradients) == ((1 + 2 * 2) * layer // 2, 3 * layer // 2)
    assert traffic(found.parameters, layout, Updates(), accumulate=3).step == 3 * sent.step


def test_updates_of_set(found):
    rules = Updates(every=100, moved=1 / 3, ranked=True)
    sent = traffic(found.parameters, Layout("fsdp2", 2), rules)
    assert sent.scores == 3 * 10 * 4 // 2  # a number a slot, padded
    assert sent.moves == 3 * (3 * 12 + 8) + 16  # of 3 blocks a layer; and the ranks are compared
    assert sent.step == sent.gradients + sent.gathers + (sent.scores + sent.moves) / 100
    assert traffic(found.parameters, Layout("ddp", 2), rules).scores == 0  # every rank has all values


def test_updates_that_score_candidates(found):
    sent = traffic(found.parameters, Layout("ddp", 2), Updates(every=10, candidates=1 / 3))
    assert sent.scores == 3 * 2 * (256 + 1) * 4  # gradients of 3 candidates a layer, padded, and their scores
    every = traffic(found.parameters, Layout("ddp", 2), Updates(every=10, candidates=5.0))
    assert every.scores == 3 * 4 * (256 + 1) * 4  # no more than there are empty places
    few = traffic(found.parameters, Layout("ddp", 2), Updates(every=10, candidates=1 / 3, score_sketches=2))
    assert few.scores == 3 * 2 * (2 + 1) * 4


def test_updates_that_screen_all_places(found):
    sent = traffic(found.parameters, Layout("ddp", 2), Updates(every=10, sketches=16))
    assert sent.scores == 3 * 16 * (16 + 1) * 4
    named = traffic(found.parameters, Layout("ddp", 2), Updates(10, candidates=1 / 3, score_sketches=2, sketches=16))
    assert named.scores == 3 * 2 * (2 + 1 + 1) * 4, "the places of candidates, in place of all sketches"


@pytest.mark.parametrize(
    ("strategy", "method", "measured"),
    [
        ("ddp", "set", (4956160, 0, 4368 + 16)),
        ("ddp", "gse", (4956160, 0, 2509200 + 4368 + 20)),
        ("ddp", "gse:2", (4956160, 0, 7344 + 4368 + 20)),
        ("fsdp2", "set", (2506752, 5013504, 2448 + 4368 + 16)),
        ("fsdp2", "gse", (2506752, 5013504, 2511648 + 4368 + 20)),
        ("fsdp2", "gse:2", (2506752, 5013504, 9792 + 4368 + 20)),
    ],
)
def test_what_two_ranks_were_measured_to_send(strategy, method, measured):
    """The rows of ``bench/results/traffic.jsonl``: the linear layers of a GPT, 90 % sparse in blocks of 32."""
    width, depth = 384, 6
    shapes = [(width, 3 * width), (3 * width, width), (width, 4 * width), (4 * width, width)]
    with torch.device("meta"):
        parts = [nn.Sequential(*(nn.Linear(n, m, bias=False) for n, m in shapes)) for _ in range(depth)]
        model = sk.sparsify_(nn.Sequential(*parts), 0.9, 32)
    x = torch.empty(4, width, device="meta")
    step = Step(model, x, lambda m, x: m(x).sum(), lambda m: torch.optim.SGD(m.parameters()))
    rules = Updates(every=3, moved=0.3, ranked=True, candidates=float(method != "set"))
    rules = replace(rules, score_sketches=2 if method == "gse:2" else 0)
    layout = Layout(strategy, 2, tuple(str(number) for number in range(depth)))
    found = trace(step)
    sent = traffic(found.parameters, layout, rules, buffers=found.index + found.buffers)
    assert (sent.gradients, sent.gathers, sent.scores + sent.moves) == measured
    assert sent.buffers == (40560 if strategy == "ddp" else 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("fsdp", 2), "strategy is 'fsdp'; it must be one of single, ddp, fsdp2"),
        (("ddp", 0), "devices is 0; it must be 1 or more"),
        (("single", 8), "strategy is 'single' and devices is 8; use ddp or fsdp2 for several devices"),
    ],
)
def test_bad_layouts(arguments, words):
    with pytest.raises(InputError, match=words):
        Layout(*arguments)


def test_a_frozen_layer_has_no_gradient():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    model[0].weight.requires_grad_(False)
    x = torch.empty(8, 64, device="meta")
    optimizer = lambda m: torch.optim.SGD([p for p in m.parameters() if p.requires_grad])  # noqa: E731
    found = trace(Step(model, x, lambda m, x: m(x).sum(), optimizer))
    sent = traffic(found.parameters, Layout("ddp", 2), Updates())
    assert sent.gradients == 64 * 64 * 4
    assert math.isclose(sent.step, sent.gradients)
