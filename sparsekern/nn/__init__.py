"""Layers, and the verbs that make a model sparse and dense again."""

from sparsekern.nn.block_sparse import BlockSparse
from sparsekern.nn.conv2d import SparseConv2d
from sparsekern.nn.densify import densify, plain_name, refresh_, sparse_layers
from sparsekern.nn.lending import lend_index
from sparsekern.nn.linear import SparseLinear
from sparsekern.nn.refusals import check_whole, left_dense
from sparsekern.nn.saving import load_, save
from sparsekern.nn.select import Selector, select
from sparsekern.nn.sparsify import sparsify_
from sparsekern.nn.weight import WeightInfo

__all__ = [
    "BlockSparse",
    "Selector",
    "SparseConv2d",
    "SparseLinear",
    "WeightInfo",
    "check_whole",
    "densify",
    "left_dense",
    "lend_index",
    "load_",
    "plain_name",
    "refresh_",
    "save",
    "select",
    "sparse_layers",
    "sparsify_",
]
