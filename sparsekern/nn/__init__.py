"""Layers, and the verbs that make a model sparse and dense again."""

from sparsekern.nn.block_sparse import BlockSparse
from sparsekern.nn.conv1d import SparseConv1d
from sparsekern.nn.conv2d import SparseConv2d
from sparsekern.nn.converters import is_replaceable, register_converter
from sparsekern.nn.dense_share import DenseShare, dense_share
from sparsekern.nn.densify import densify, plain_name, refresh_, sparse_layers
from sparsekern.nn.lending import lend_index
from sparsekern.nn.linear import SparseLinear
from sparsekern.nn.refusals import left_dense, refuse_sharded
from sparsekern.nn.select import Selector, select
from sparsekern.nn.sparsify import sparsify_
from sparsekern.nn.weight import WeightInfo

__all__ = [
    "BlockSparse",
    "DenseShare",
    "Selector",
    "SparseConv1d",
    "SparseConv2d",
    "SparseLinear",
    "WeightInfo",
    "dense_share",
    "densify",
    "is_replaceable",
    "left_dense",
    "lend_index",
    "plain_name",
    "refresh_",
    "refuse_sharded",
    "register_converter",
    "select",
    "sparse_layers",
    "sparsify_",
]
