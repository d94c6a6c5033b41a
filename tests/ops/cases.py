"""Small layers and convolutions in float64, by name, with what is free or phantom zero as in a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.kernels.calls import AnyCase, is_real
from tests.oracle import random_case
from tests.oracle_conv2d import conv_case

F64 = torch.float64
LINEAR = {"block": (4, 2), "blocks": 7, "free": 2, "tokens": 5, "x_layout": "contiguous", "dy_layout": "contiguous"}
CONV: dict[str, Any] = {"block": (2, 3), "stride": (1, 1), "padding": (0, 0, 0, 0), "groups": 1, "dilation": (1, 1)}
CONV |= {"group_out": 3, "group_in": 4, "height": 3, "width": 5, "images": 2, "blocks": 3, "free": 1}

LAYERS: dict[str, dict[str, Any]] = {
    "edges": {"rows": 3, "cols": 5, "out_features": 11, "in_features": 9},
    "whole": {"block": (4, 4), "rows": 2, "cols": 3, "out_features": 8, "in_features": 12, "blocks": 3},
    "unstructured": {"block": (1, 1), "rows": 5, "cols": 7, "out_features": 5, "in_features": 7, "blocks": 17},
    "one block": {"block": (8, 8), "rows": 1, "cols": 1, "out_features": 3, "in_features": 2, "blocks": 1},
}
CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "3x3": {"kernel": (3, 3), "padding": (1, 1, 1, 1)},
    "stride": {"kernel": (2, 3), "stride": (2, 1), "padding": (1, 0, 1, 2)},
    "groups": {"kernel": (1, 3), "groups": 2, "dilation": (1, 2)},
    "pointwise": {"kernel": (1, 1)},
}
ALL = [*LAYERS, *CONVOLUTIONS]


def make(name: str, **given: Any) -> AnyCase:
    settings = {"dtype": F64, "bias": True, **given}
    if name in LAYERS:
        return random_case(0, **{**LINEAR, **LAYERS[name], **settings})
    return conv_case(0, **{**CONV, **CONVOLUTIONS[name], **settings})


def leaves(case: AnyCase) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, values and bias as leaves."""
    assert case.bias is not None
    values = case.values.masked_fill(~is_real(case), 0)
    x, values, bias = (t.detach().clone().requires_grad_() for t in (case.x, values, case.bias))
    return x, values, bias
