"""Which blocks of a weight are stored, and the index that kernels read."""

from sparsekern.kernels.contract import PADDING, Index
from sparsekern.topology.absent import sample_absent, sample_distinct
from sparsekern.topology.dense import dense_block_norms, gather_blocks, to_dense
from sparsekern.topology.distributions import DISTRIBUTIONS, allocate, blocks_at, check_sparsity
from sparsekern.topology.draw import balanced, by_norm, check_count, from_mask, random
from sparsekern.topology.grid import Grid, block_pair, conv_grid
from sparsekern.topology.index import (
    build_index,
    empty_index,
    index_bytes,
    mask_index,
    mask_index_,
    ordered_keys,
    rebuild_,
    stored_blocks,
)
from sparsekern.topology.pairs import are_absent, distinct_absent, row_weights, sample_absent_pairs, sample_pairs
from sparsekern.topology.places import places_for
from sparsekern.topology.reblocking import reblock
from sparsekern.topology.seeds import generator_for
from sparsekern.topology.source import IndexSource, copy_index_, current_index, fresh_index, same_index
from sparsekern.topology.tied import check_multiple, check_tied, one_tap, tie
from sparsekern.topology.topology import Topology, from_keys, with_capacity

__all__ = [
    "DISTRIBUTIONS",
    "PADDING",
    "Grid",
    "Index",
    "IndexSource",
    "Topology",
    "allocate",
    "are_absent",
    "balanced",
    "block_pair",
    "blocks_at",
    "build_index",
    "by_norm",
    "check_count",
    "check_multiple",
    "check_sparsity",
    "check_tied",
    "conv_grid",
    "copy_index_",
    "current_index",
    "dense_block_norms",
    "distinct_absent",
    "empty_index",
    "fresh_index",
    "from_keys",
    "from_mask",
    "gather_blocks",
    "generator_for",
    "index_bytes",
    "mask_index",
    "mask_index_",
    "one_tap",
    "ordered_keys",
    "places_for",
    "random",
    "reblock",
    "rebuild_",
    "row_weights",
    "same_index",
    "sample_absent",
    "sample_absent_pairs",
    "sample_distinct",
    "sample_pairs",
    "stored_blocks",
    "tie",
    "to_dense",
    "with_capacity",
]
