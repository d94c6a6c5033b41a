"""The two vectors that guide GSE's draws, against the plainest way, and what their product says of the gradient."""

from __future__ import annotations

import pytest
import torch

from sparsekern.ops.marginals import magnitudes, signed_sums, token_signs

F64 = torch.float64


def data(tokens: int = 6, dtype: torch.dtype = F64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(tokens, n, dtype=F64, generator=generator).to(dtype) for n in (7, 5))


def hashes(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, (n,), generator=generator).float() for n in (7, 5)]


def test_magnitudes_by_hand():
    dy, x = torch.tensor([[1.0, -2.0, 3.0], [0.0, 4.0, -1.0]]), torch.tensor([[1.0, -1.0], [2.0, 0.0]])
    assert magnitudes(dy, x, (1, 1)).tolist() == [1, 6, 4, 3, 1]
    # blocks of 2 x 1: squares of dy in rows {0, 1} and {2}, and of x
    torch.testing.assert_close(magnitudes(dy, x, (2, 1)), torch.tensor([21.0, 10, 5, 1]))
    assert magnitudes(dy, x, (2, 2)).tolist() == [21, 10, 6]


@pytest.mark.parametrize("block", [(1, 1), (4, 2), (1, 3), (4, 1)])
def test_their_product_bounds_the_gradient(block):
    """Equation of GraBo: |G| <= (|dy|' 1)(1' |x|) at 1x1; for blocks the Frobenius norms."""
    dy, x = data()
    rows = -(-7 // block[0])
    g = torch.zeros(rows * block[0], -(-5 // block[1]) * block[1], dtype=F64)
    g[:7, :5] = dy.T @ x
    norms = g.unflatten(0, (rows, block[0])).unflatten(2, (-1, block[1])).norm(dim=(1, 3))
    parts = magnitudes(dy, x, block)
    parts = parts if block == (1, 1) else parts.sqrt()
    bound = parts[:rows, None] * parts[rows:]
    assert (norms <= bound).all() and (norms > bound / 10).any()


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_signed_sums_use_one_sign_a_token_for_both(dtype):
    dy, x = data(dtype=dtype)
    signs = token_signs(dy, x, *hashes(0))
    assert set(signs.tolist()) == {-1, 1}
    sums = signed_sums(dy, x, *hashes(0))
    assert sums.dtype == (F64 if dtype == F64 else torch.float32)
    expected = torch.cat([signs.to(F64) @ dy.to(F64), signs.to(F64) @ x.to(F64)])
    # Six signed numbers summed in float32 and the sum rounded once to the dtype, as the design bounds a kernel's error.
    magnitude = torch.cat([dy.to(F64).abs().sum(0), x.to(F64).abs().sum(0)])
    bound = 8 * torch.finfo(sums.dtype).eps * magnitude + torch.finfo(dtype).eps * expected.abs()
    assert ((sums.to(F64) - expected).abs() <= bound).all()


def test_the_sign_of_a_token_does_not_depend_on_its_batch():
    dy, x = data(9)
    whole = token_signs(dy, x, *hashes(1))
    assert torch.equal(whole, token_signs(dy * (1 / 3), x * (1 + 1e-6), *hashes(1))), "nor on scaling or rounding"
    parts = torch.cat([token_signs(dy[a:b], x[a:b], *hashes(1)) for a, b in ((0, 2), (2, 9))])
    assert torch.equal(whole, parts)


@pytest.mark.parametrize("same_input", [False, True])
def test_signs_are_fair_and_independent_in_pairs(same_input):
    """Tokens of one input, as in a padded or flat image, differ by their gradient."""
    dy, x = data(6, torch.float32)
    if same_input:
        x = x[:1].expand_as(x).contiguous()
    draws = 4000
    signs = torch.stack([token_signs(dy, x, *hashes(seed)) for seed in range(draws)]).double()
    products = signs.T @ signs / draws - torch.eye(6)
    assert (signs.mean(0).abs() < 5 / draws**0.5).all()
    assert (products.abs() < 5 / draws**0.5).all()


def test_the_product_of_the_sums_is_an_unbiased_sketch_of_the_gradient():
    """E[(s dy)(s x)'] = dy' x, with variance |x|^2 |y|^2 + (x.y)^2 - 2 sum x^2 y^2 for an element."""
    dy, x = data(8)
    g = dy.T @ x
    draws = 6000
    sums = torch.stack([signed_sums(dy, x, *hashes(seed)) for seed in range(draws)])
    estimates = sums[:, :7, None] * sums[:, None, 7:]
    variance = (dy**2).sum(0)[:, None] * (x**2).sum(0) + g**2 - 2 * (dy**2).T @ x**2
    assert ((estimates.mean(0) - g).abs() < 5 * (variance / draws).sqrt()).all()
    assert (estimates.var(0) / variance - 1).abs().max() < 0.25
