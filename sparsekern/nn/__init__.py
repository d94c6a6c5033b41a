"""Sparse layers, and functions that make a model sparse or dense again."""

from sparsekern.nn.attention import SplitAttention, split_attention_
from sparsekern.nn.block_sparse import BlockSparse
from sparsekern.nn.conv import SparseConv1d, SparseConv2d
from sparsekern.nn.converters import is_replaceable, register_converter, register_host
from sparsekern.nn.dense_layers import Choice, DenseShare, dense_share, left_dense, register_racer
from sparsekern.nn.indexed import lend_index
from sparsekern.nn.linear import SparseLinear
from sparsekern.nn.norm import norm_relu
from sparsekern.nn.selectors import Selector, select
from sparsekern.nn.sharded import refuse_sharded
from sparsekern.nn.sparsify import sparsify_
from sparsekern.nn.surgery import densify, densify_, plain_name, refresh_, sparse_layers
from sparsekern.nn.weight import WeightInfo
from sparsekern.ops import qkv_attention

__all__ = [
    "BlockSparse",
    "Choice",
    "DenseShare",
    "Selector",
    "SparseConv1d",
    "SparseConv2d",
    "SparseLinear",
    "SplitAttention",
    "WeightInfo",
    "dense_share",
    "densify",
    "densify_",
    "is_replaceable",
    "left_dense",
    "lend_index",
    "norm_relu",
    "plain_name",
    "qkv_attention",
    "refresh_",
    "refuse_sharded",
    "register_converter",
    "register_host",
    "register_racer",
    "select",
    "sparse_layers",
    "sparsify_",
    "split_attention_",
]
