"""An index knows what it was built from."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from sparsekern.topology import (
    Grid,
    IndexSource,
    Topology,
    build_index,
    conv_grid,
    current_index,
    fresh_index,
    from_keys,
)


def ints(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


@pytest.fixture(params=[(1, 1), (4, 3)], ids=["1x1", "4x3"])
def source(request) -> IndexSource:
    block = request.param
    topology = Topology(Grid(4 * block[0], 3 * block[1], block), ints(0, 3, 1, -1), ints(2, 0, 2, -1))
    return IndexSource(topology, build_index(topology), tied=False, owner="layer 'fc'")


def test_writes_of_equal_numbers_fit_after_a_look(source):
    assert source.fits()
    for tensor in (source.row, source.index.row_slot):
        tensor.copy_(tensor.clone())
        assert not source.fits()
        source.renew()
        assert source.fits()


def test_an_index_alone_is_rebuilt(source):
    expected = [part.clone() for part in source.index]
    source.index.col_slot.fill_(-7)
    source.renew()
    assert source.fits()
    assert all(torch.equal(part, same) for part, same in zip(source.index, expected, strict=True))


def test_other_places_raise_until_they_are_accepted(source):
    source.row[0] = 2
    for _ in range(2):
        with pytest.raises(ValueError, match="other code overwrote row and col of layer 'fc', and its index was built"):
            source.renew()
        assert not source.fits()
    source.accept()
    assert source.fits()


def test_no_topology_raises(source):
    source.col[1] = 3
    with pytest.raises(ValueError, match=r"they are no topology: slot 1 is at block \(3, 3\)"):
        source.renew()


def test_taps_that_parted_raise():
    topology = from_keys(conv_grid(4, 4, (1, 2), (4, 4)), torch.tensor([0]))
    with pytest.raises(ValueError, match="they are no topology: .*tap"):
        fresh_index(topology, True, "a sparse layer")
    assert fresh_index(topology, False, "a sparse layer").slots == 1


def test_an_op_compares_what_it_is_given(source):
    assert current_index(list(source.index)) == source.index
    source.row.copy_(source.row.clone())
    current_index(list(source.index))
    assert source.fits()
    source.col[0] = 1
    with pytest.raises(ValueError, match="overwrote row and col"):
        current_index(list(source.index))
    for twin in (copy.deepcopy(source.index), pickle.loads(pickle.dumps(source.index))):
        assert len(current_index(list(twin))) == 6, "a copy is not that of the source"


def test_a_source_that_is_gone_says_nothing():
    topology = Topology(Grid(4, 4, (2, 2)), ints(0, 1), ints(1, 0))
    index = build_index(topology)
    source = IndexSource(topology, index, tied=False, owner="")
    topology.row[0] = 9
    with pytest.raises(ValueError, match="overwrote row and col"):
        current_index(list(index))
    del source
    assert current_index(list(index)) == index


def test_a_doubtful_index_is_compared_first(source):
    topology = source.topology
    twin = IndexSource(topology, build_index(topology), tied=False, owner="", doubtful=True)
    assert not twin.fits()
    twin.renew()
    assert twin.fits()
    other = Topology(topology.grid, ints(1, 3, 0, -1), topology.col.clone())
    wrong = build_index(other)._replace(row_col=topology.col, col_row=topology.row)
    if topology.grid.block == (1, 1):
        twin = IndexSource(topology, wrong, tied=False, owner="", doubtful=True)
    else:
        twin = IndexSource(topology, build_index(other), tied=False, owner="", doubtful=True)
    with pytest.raises(ValueError, match="built from other places"):
        twin.renew()
