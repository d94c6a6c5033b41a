"""c, by hand and where it says nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sparsekern.training.agent.weighting import Products, from_losses, from_products, inner, smoothed


def test_losses_that_are_the_same_give_one_and_unrelated_ones_about_zero():
    draw = np.random.default_rng(0)
    a, b = draw.random(2000) + 1, draw.random(2000) + 1
    ones = [1.0] * 2000
    assert from_losses(a.tolist(), a.tolist(), ones) == pytest.approx(1)
    assert from_losses(a.tolist(), b.tolist(), ones) < 0.05
    mixed = (0.4 * a + b).tolist()
    covariance = np.cov(mixed, a, ddof=1)
    assert from_losses(mixed, a.tolist(), ones) == pytest.approx(covariance[0, 1] / covariance[1, 1], rel=1e-12)


def test_a_weight_is_a_batch_so_many_times():
    new, old = [1.0, 4.0, 2.0], [2.0, 3.0, 5.0]
    assert from_losses(new, old, [2.0, 1.0, 1.0]) == pytest.approx(from_losses([1.0, *new], [2.0, *old], [1.0] * 4))


def test_it_lies_between_zero_and_one():
    assert from_losses([1.0, 2.0], [2.0, 1.0], [1.0, 1.0]) == 0
    assert from_losses([1.0, 9.0], [1.0, 2.0], [1.0, 1.0]) == 1
    assert from_products(-1.0, 2.0) == 0 and from_products(3.0, 2.0) == 1 and from_products(1.0, 4.0) == 0.25


@pytest.mark.parametrize(
    ("new", "old"),
    [
        ([], []),
        ([1.0], [2.0]),
        ([1.0, 2.0], [3.0, 3.0]),
        ([1.0, 2.0], [3.0, 3.0 + 1e-7]),  # rounding
        ([1.0, math.nan], [1.0, 2.0]),
        ([1.0, 2.0], [math.inf, 2.0]),
    ],
)
def test_losses_that_say_nothing(new, old):
    assert from_losses(new, old, [1.0] * len(new)) is None
    assert smoothed(0.3, None, 0.5) == 0.3


def test_smoothing():
    assert smoothed(0.2, 1.0, 0.3) == pytest.approx(0.7 * 0.2 + 0.3)


def test_products_add_up_and_one_that_overflowed_does_not_count():
    products = Products(2, torch.device("cpu"))
    products.add(torch.tensor([[1.0, 4.0], [0.0, 0.0]]))
    products.add(torch.tensor([[1.0, torch.inf], [1.0, 1.0]]))
    products.add(torch.tensor([[2.0, 4.0], [0.0, 0.0]]))
    assert products.estimates() == [3 / 8, None] and products.estimates() == [None, None]
    assert from_products(math.nan, 1.0) is None


def test_an_inner_product_of_half_precision_does_not_overflow():
    a = torch.full((100,), 300.0, dtype=torch.float16)
    assert inner(a, a) == 9e6 and inner(a, a).dtype == torch.float64
