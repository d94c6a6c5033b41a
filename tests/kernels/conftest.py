"""What the tests of all CPU backends take: the calls of a backend, blocks that it has, and kinds of cases."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
from sparsekern.kernels import eager

from tests.kernels.calls import AnyCase, Calls, small_conv, small_layer

Block = tuple[int, int]
Make = Callable[..., AnyCase]


@pytest.fixture
def calls(backend: ModuleType) -> Calls:
    return Calls(backend)


@pytest.fixture(params=["1x1", "blocks"])
def block(request: pytest.FixtureRequest, backend: ModuleType) -> Block:
    if request.param == "1x1":
        return 1, 1
    return (4, 4) if backend is eager else (16, 32)


@pytest.fixture(params=[small_layer, small_conv])
def make(request: pytest.FixtureRequest) -> Make:
    return request.param
