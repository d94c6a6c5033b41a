"""Which kernels work on lists of places."""

from __future__ import annotations

import inspect

import pytest
import torch
from sparsekern.kernels.cpu import library
from sparsekern.kernels.cpu import places as cpu
from sparsekern.kernels.eager import places as eager

from sparsekern.topology.places import Places, places_for


def test_both_have_all_functions() -> None:
    names = [name for name in vars(Places) if not name.startswith("_")]
    assert sorted(names) == sorted(eager.__all__) == sorted(set(cpu.__all__) - {"takes"})
    for name in names:
        wanted = list(inspect.signature(getattr(Places, name)).parameters)[1:]
        assert all(list(inspect.signature(getattr(kernels, name)).parameters) == wanted for kernels in (cpu, eager))


def test_the_native_ones_are_taken_where_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = torch.zeros(3, dtype=torch.int32)
    monkeypatch.setattr(cpu, "load", lambda: (object(), ""))
    assert places_for(numbers, numbers) is cpu
    assert places_for(numbers, numbers.to("meta")) is eager
    monkeypatch.setattr(cpu, "load", lambda: (None, ""))
    assert places_for(numbers) is eager
    assert library.load is not cpu.load
