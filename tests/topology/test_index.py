"""The index that kernels read: built, masked, and compared with what it was built from."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparsekern.kernels.eager import places as eager
from torch import Tensor

from sparsekern.topology import (
    PADDING,
    Grid,
    Index,
    IndexSource,
    Topology,
    build_index,
    conv_grid,
    current_index,
    empty_index,
    fresh_index,
    from_keys,
    index_bytes,
    mask_index,
    mask_index_,
    ordered_keys,
    rebuild_,
    with_capacity,
)
from sparsekern.topology import index as index_module
from tests.topology.strategies import ints, places, topologies


def five_blocks(block: int) -> Topology:
    """Slots a to e in a 3 x 4 grid, and slot f, which is free and comes first.

    . b . d
    . . . .
    c . a e
    """
    return Topology(Grid(3 * block, 4 * block, (block, block)), ints(-1, 2, 0, 2, 0, 2), ints(-1, 2, 1, 0, 3, 3))


def plain_lists(topology: Topology) -> dict[str, list[int]]:
    """Build the index with sorted() and loops: lists of the used slots alone, without padding."""
    at = [(r, c, z) for z, (r, c) in enumerate(places(topology)) if r >= 0]
    by_row, by_col = sorted(at), sorted(at, key=lambda entry: (entry[1], entry[0]))
    return {
        "row_ptr": [sum(r < row for r, _, _ in at) for row in range(topology.grid.rows + 1)],
        "row_col": [c for _, c, _ in by_row],
        "row_slot": [z for _, _, z in by_row],
        "col_ptr": [sum(c < col for _, c, _ in at) for col in range(topology.grid.cols + 1)],
        "col_row": [r for r, _, _ in by_col],
        "col_slot": [z for _, _, z in by_col],
    }


def assert_index_is(index: Index, expected: dict[str, list[int]], topology: Topology) -> None:
    """Compare with :func:`plain_lists`; where the lists are the topology's own (1x1), read them by slot."""
    by_slot = topology.grid.block == (1, 1)
    blocks = len(expected["row_slot"])
    for name, tensor in index._asdict().items():
        assert tensor.dtype == torch.int32, name
        if name.endswith("ptr"):
            assert tensor.tolist() == expected[name], name
        elif by_slot and name in ("row_col", "col_row"):
            slots = expected["row_slot" if name == "row_col" else "col_slot"]
            assert tensor.shape == (topology.slots,), name
            assert tensor[slots].tolist() == expected[name], name
        else:
            assert tensor.shape == (topology.slots + PADDING,), name
            assert tensor[:blocks].tolist() == expected[name], name
    for name in ("row_slot", "col_slot"):
        assert sorted(getattr(index, name)[: topology.slots].tolist()) == list(range(topology.slots)), name


# Building.


@pytest.mark.parametrize("block", [1, 2])
def test_an_index_by_hand(block: int) -> None:
    index = build_index(five_blocks(block))

    assert index.row_ptr.tolist() == [0, 2, 2, 5]
    assert index.row_slot[:6].tolist() == [2, 4, 3, 1, 5, 0]  # b d | | c a e, then the free slot
    assert index.col_ptr.tolist() == [0, 1, 2, 3, 5]
    assert index.col_slot[:6].tolist() == [3, 2, 1, 4, 5, 0]  # c | b | a | d e, then the free slot
    if block > 1:
        assert index.row_col[:5].tolist() == [1, 3, 0, 2, 3]
        assert index.col_row[:5].tolist() == [2, 0, 2, 0, 2]


def test_at_1x1_two_lists_are_the_topology_itself() -> None:
    topology = five_blocks(1)
    index = build_index(topology)

    assert index.row_col is topology.col
    assert index.col_row is topology.row


@pytest.mark.parametrize("block", [1, 16])
def test_places_may_be_given_in_any_strides_and_in_int64(block: int) -> None:
    """Native kernels read an index as it lies in memory."""
    topology = five_blocks(block)
    pairs = torch.stack([topology.row, topology.col], 1)
    for row, col in (pairs.unbind(1), pairs.long().unbind(1), (topology.row.long(), topology.col.long())):
        index = build_index(Topology(topology.grid, row, col))

        assert all(torch.equal(found, wanted) for found, wanted in zip(index, build_index(topology), strict=True))
        assert all(tensor.dtype is torch.int32 and tensor.is_contiguous() for tensor in index)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(topologies())
def test_any_index_is_the_one_of_plain_python(topology: Topology) -> None:
    assert_index_is(build_index(topology), plain_lists(topology), topology)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(topologies())
def test_the_padding_is_zero_and_every_entry_legal(topology: Topology) -> None:
    index, slots = build_index(topology), topology.slots

    for name in ("row_slot", "col_slot"):
        assert not getattr(index, name)[slots:].any()
    if topology.grid.block != (1, 1):
        assert not index.row_col[slots:].any()
        assert not index.col_row[slots:].any()
        assert 0 <= int(index.row_col.min()) <= int(index.row_col.max()) < topology.grid.cols
        assert 0 <= int(index.col_row.min()) <= int(index.col_row.max()) < topology.grid.rows


def test_keys_near_the_end_of_int32() -> None:
    """The last cell of the largest legal grid: its key is 2**31 - 2, and one more are the cells."""
    grid = Grid(2**15 - 1, 2**16 + 2, (1, 1))
    assert grid.cells == 2**31 - 2
    last = ints(grid.rows - 1, -1, 0), ints(grid.cols - 1, -1, 5)

    index = build_index(Topology(grid, *last))

    assert index.row_slot[:3].tolist() == [2, 0, 1]
    assert index.col_slot[:3].tolist() == [2, 0, 1]
    assert index.row_ptr[[0, 1, -2, -1]].tolist() == [0, 1, 1, 2]
    assert index.col_ptr[[5, 6, -2, -1]].tolist() == [0, 1, 1, 2]


# Rebuilding.


@pytest.mark.parametrize("block", [1, 2])
def test_rebuild_writes_in_place(block: int) -> None:
    """A block moves and the free slot is taken: same tensors, same addresses, the new index."""
    topology = five_blocks(block)
    index = build_index(topology)
    addresses = [tensor.data_ptr() for tensor in index]

    topology.row.copy_(ints(1, 2, 0, 2, 1, 2))
    topology.col.copy_(ints(0, 2, 1, 0, 1, 3))
    rebuild_(index, topology)

    assert [tensor.data_ptr() for tensor in index] == addresses
    assert_index_is(index, plain_lists(topology), topology)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(topologies())
def test_rebuild_leaves_nothing_of_what_was_there(topology: Topology) -> None:
    """From full of garbage, as after to_empty(), and twice in a row."""
    index = empty_index(topology)
    for name, tensor in index._asdict().items():
        if topology.grid.block != (1, 1) or name not in ("row_col", "col_row"):
            tensor[: tensor.shape[0] - (0 if name.endswith("ptr") else PADDING)] = 77
    rebuild_(index, topology)
    rebuild_(index, topology)

    assert_index_is(index, plain_lists(topology), topology)


def test_an_empty_index_has_the_shapes_of_a_full_one() -> None:
    for block in (1, 2):
        empty, full = empty_index(five_blocks(block)), build_index(five_blocks(block))
        assert [tensor.shape for tensor in empty] == [tensor.shape for tensor in full]


# Masks over slots.


def masked(topology: Topology, keep: Tensor) -> Topology:
    """Return the topology in which the slots that are not kept are free."""
    return Topology(topology.grid, *(torch.where(keep, t, -1).int() for t in (topology.row, topology.col)))


@pytest.mark.parametrize("block", [1, 2])
def test_a_mask_by_hand(block: int) -> None:
    """Of b d | | c a e the slots 2 (b), 1 (a) and the free one are kept."""
    topology = five_blocks(block)
    keep = torch.tensor([True, True, True, False, False, False])

    index = mask_index(build_index(topology), keep, topology.grid.block)

    assert index.row_ptr.tolist() == [0, 1, 1, 2]
    assert index.row_slot[:2].tolist() == [2, 1]
    assert index.col_ptr.tolist() == [0, 0, 1, 2, 2]
    assert index.col_slot[:2].tolist() == [2, 1]


@settings(deadline=None, max_examples=150, derandomize=True)
@given(topologies(), st.sampled_from([None, 1, 3, 2**16]), st.data())
def test_a_masked_index_is_that_of_kept_blocks(topology: Topology, chunk: int | None, data: st.DataObject) -> None:
    """By the kernels for this device, and by the eager ones in chunks of any size."""
    keep = data.draw(
        st.one_of(
            st.lists(st.booleans(), min_size=topology.slots, max_size=topology.slots),
            st.just([False] * topology.slots),
            st.just([True] * topology.slots),
        )
    )
    index = build_index(topology)
    before = [tensor.clone() for tensor in index]

    with pytest.MonkeyPatch.context() as patch:
        if chunk is not None:
            patch.setattr(index_module, "places_for", lambda *_: eager)
            patch.setattr(eager, "CHUNK", chunk)
        result = mask_index(index, torch.tensor(keep), topology.grid.block)

    assert_index_is(result, plain_lists(masked(topology, torch.tensor(keep))), topology)
    for tensor, was in zip(index, before, strict=True):
        assert torch.equal(tensor, was)  # transient: the layer's own index is not touched


@pytest.mark.parametrize("block", [1, 2])
def test_a_masked_index_is_padded_with_zeros(block: int) -> None:
    topology = five_blocks(block)

    index = mask_index(build_index(topology), torch.zeros(6, dtype=torch.bool), topology.grid.block)

    assert not index.row_slot[6:].any()
    assert not index.col_slot[6:].any()
    assert index.row_slot.shape == (6 + PADDING,)


def test_masks_can_be_masked_again() -> None:
    topology = with_capacity(five_blocks(2), 8)
    first = torch.tensor([1, 1, 1, 1, 0, 0, 1, 1]).bool()
    second = torch.tensor([1, 1, 0, 0, 1, 1, 1, 1]).bool()

    index = mask_index(mask_index(build_index(topology), first, (2, 2)), second, (2, 2))

    assert_index_is(index, plain_lists(masked(topology, first & second)), topology)


# Bytes.


@settings(deadline=None, max_examples=60, derandomize=True)
@given(topologies())
def test_index_bytes_are_those_of_the_tensors(topology: Topology) -> None:
    tensors = {t.data_ptr(): t for t in (topology.row, topology.col, *build_index(topology))}

    assert index_bytes(topology.grid, topology.slots) == sum(t.nbytes for t in tensors.values())


def test_a_value_of_its_own_costs_16_bytes_of_index() -> None:
    """At 1x1; the pointers and the padding vanish beside a million values."""
    assert index_bytes(Grid(4096, 4096, (1, 1)), 10**6) / 10**6 == pytest.approx(16, rel=0.003)


def test_a_block_costs_24_bytes_of_index() -> None:
    assert index_bytes(Grid(2**15, 2**15, (16, 16)), 10**6) / 10**6 == pytest.approx(24, rel=0.001)


def test_at_1x1_an_index_cannot_be_rebuilt_for_another_topology() -> None:
    """Two of its lists are the first topology's own tensors: they would stay behind."""
    grid = Grid(2, 2, (1, 1))
    first, second = (Topology(grid, *torch.tensor([[0, 1], [c, 1 - c]], dtype=torch.int32)) for c in (0, 1))
    index = build_index(first)
    with pytest.raises(ValueError, match="index is of another topology, and with 1x1 blocks it shares row and col"):
        rebuild_(index, second)


@pytest.mark.parametrize("block", [1, 2])
def test_a_masked_index_is_written_into_the_same_tensors(block: int) -> None:
    topology = five_blocks(block)
    own, into = build_index(topology), empty_index(topology)
    addresses = [t.data_ptr() for t in into]
    for keep in (torch.tensor([True, False, True, False, True, True]), torch.tensor([False] * 6)):
        keep = keep[: topology.slots]
        mask_index_(into, own, keep, topology.grid.block)
        for written, expected in zip(into, mask_index(own, keep, topology.grid.block), strict=True):
            assert torch.equal(written, expected)
    assert [t.data_ptr() for t in into] == addresses


@settings(deadline=None, max_examples=50, derandomize=True)
@given(topologies())
def test_places_in_order_need_less_sorting(topology: Topology) -> None:
    order = topology.keys().argsort(stable=True)
    topology = Topology(topology.grid, topology.row[order], topology.col[order])
    for found, expected in zip(build_index(topology, ascending=True), build_index(topology), strict=True):
        assert torch.equal(found, expected)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(topologies())
def test_the_keys_are_in_the_order_of_the_index(topology: Topology) -> None:
    assert torch.equal(ordered_keys(build_index(topology), topology), topology.sorted_keys())


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
    with pytest.raises(ValueError, match=r"are not a topology now: slot 1 is at block \(3, 3\)"):
        source.renew()


def test_taps_that_parted_raise():
    topology = from_keys(conv_grid(4, 4, (1, 2), (4, 4)), torch.tensor([0]))
    with pytest.raises(ValueError, match="are not a topology now: .*tap"):
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
