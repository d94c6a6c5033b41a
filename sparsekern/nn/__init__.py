"""Layers, and the verbs that make a model sparse and dense again."""

from sparsekern.nn.block_sparse import BlockSparse
from sparsekern.nn.conv2d import SparseConv2d
from sparsekern.nn.densify import densify, plain_name, refresh_, sparse_layers
from sparsekern.nn.lending import lend_index
from sparsekern.nn.linear import SparseLinear
from sparsekern.nn.refusals import left_dense, refuse_sharded
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
    "densify",
    "left_dense",
    "lend_index",
    "load_",
    "plain_name",
    "refresh_",
    "refuse_sharded",
    "save",
    "select",
    "sparse_layers",
    "sparsify_",
]
