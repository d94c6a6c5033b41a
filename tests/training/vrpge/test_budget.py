"""What may remain of a model with layers of several sizes."""

from __future__ import annotations

import pytest
import torch

import sparsekern as sk
from sparsekern.training.vrpge.budget import Budget
from sparsekern.training.vrpge.candidates import Candidates


def budget(sparsity=None, scope="global", costs=None, floor=0.0, group="block"):
    a = sk.SparseLinear(16, 16, block_size=4, sparsity=0.5, seed=0)  # 8 candidates of 16 places
    b = sk.SparseLinear(16, 32, block_size=4, sparsity=0, seed=0)  # 32 of 32
    candidates = {"a": Candidates(a, group), "b": Candidates(b, group)}
    return Budget(candidates, sparsity, scope, costs, floor, "sort")


def test_the_ratio_of_the_candidates_and_their_places():
    found = budget(0.75)  # 12 of 48 places, of 40 candidates
    assert found.ratio == pytest.approx(0.3) and found.units == 40
    assert found.part("a") == slice(0, 8) and found.part("b") == slice(8, 40)
    assert budget().ratio == 0.5


def test_a_global_budget_lets_layers_compete_and_one_of_each_layer_does_not():
    wanted = torch.cat([torch.ones(8), torch.zeros(32) + 0.2])
    both = budget(0.75).project(wanted)
    assert float(both.sum()) == pytest.approx(12, rel=1e-6) and float(both[:8].sum()) > 7
    each = budget(0.75, scope="layer").project(wanted)
    assert float(each[:8].sum()) == pytest.approx(2.4, rel=1e-6) and float(each[8:].sum()) == pytest.approx(6.4)


def test_the_top_is_the_exact_number():
    s = torch.linspace(0, 1, 40)
    assert budget(0.75).top(s).nonzero().squeeze(1).tolist() == list(range(28, 40))
    assert budget(0.75, scope="layer").top(s).sum() == 2 + 9


def test_costs_make_operations_of_elements():
    # elements of a cost 9: 9 * 8 + 32 = 104 candidates' worth, of 9 * 16 + 32 = 176 in all, of which a quarter stays
    found = budget(0.75, costs={"a": 9.0})
    assert found.ratio == pytest.approx(44 / 104)
    s = found.project(torch.ones(40))
    assert 9 * float(s[:8].sum()) + float(s[8:].sum()) == pytest.approx(44, rel=1e-5)
    assert s[:8].max() < s[8:].min(), "the dear ones lose more"


def filters(costs, sparsities=(0.0, 0.0, 0.0)) -> Budget:
    """The filters of three convolutions, of 144, 144 and 576 elements."""
    sizes = ((16, 16), (16, 32), (64, 64))
    layers = [
        sk.SparseConv2d(*size, 3, block_size=1, sparsity=s, seed=0) for size, s in zip(sizes, sparsities, strict=True)
    ]
    return Budget({str(i): Candidates(m, "row") for i, m in enumerate(layers)}, 0.5, "global", costs, 0.0, "sort")


def test_with_units_that_cost_the_same_no_filter_pays_for_its_size():
    """Equal wishes get equal probabilities; counted by elements small filters push the large ones out."""
    found = filters("units")
    s = found.project(torch.full((112,), 0.9))
    assert torch.allclose(s, torch.full_like(s, 0.5)) and found.ratio == 0.5
    assert found.top(torch.linspace(1, 0, 112)).sum() == 56, "half of the filters, of whatever layer"
    by_elements = filters(None).project(torch.full((112,), 0.9))
    assert by_elements[:48].min() > by_elements[48:].max() + 0.2
    assert float(by_elements[:48].sum() * 144 + by_elements[48:].sum() * 576) == pytest.approx(
        (48 * 144 + 64 * 576) / 2
    )


def test_units_of_layers_that_store_a_part_of_their_blocks():
    """A quarter and three quarters stored: the filters of a whole layer would be 4 and 4/3 times those candidates."""
    found = filters("units", (0.75, 0.25, 0.0))
    assert found.ratio == pytest.approx(0.5 * (16 * 4 + 32 * 4 / 3 + 64) / 112, rel=1e-3)
    found.refresh()
    assert torch.allclose(found.project(torch.ones(112)), torch.tensor(found.ratio))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sparsity": 0.1}, r"sparsity is 0.1, but the layers store too few .* sparsity 0.1667. Build them at .* 0"),
        ({"sparsity": 1.5}, "sparsity is 1.5"),
        ({"costs": {"c": 1.0}}, "costs names c; the layers are a, b"),
        ({"costs": {"a": 0.0}}, "costs of 'a' is 0.0; it must be above 0"),
        ({"costs": "filters"}, "costs is 'filters'; it must be 'units', or numbers by the names of layers"),
        ({"floor": 0.6}, "floor is 0.6; it must be 0 to 0.5, the fraction of the candidates that may remain"),
    ],
)
def test_errors(options, text):
    with pytest.raises(ValueError, match=text):
        budget(**options)


def test_expected_elements():
    found = budget(0.75)
    s = torch.zeros(40).index_fill_(0, torch.tensor([0, 3]), 0.25)
    assert found.expected_elements("a", s) == 0.5 * 16 and found.expected_elements("b", s) == 0
