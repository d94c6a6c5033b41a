"""Sparse-IFT: larger sparse layers with the FLOPs of a dense layer (Thangarasa et al., ICML 2024)."""

from sparsekern.transforms.layers import (
    SparseDoped,
    SparseFactorized,
    SparseParallel,
    sparse_doped,
    sparse_factorized,
    sparse_parallel,
    sparse_wide,
)
from sparsekern.transforms.network import TRANSFORMS, transform
from sparsekern.transforms.twins import Width

__all__ = [
    "TRANSFORMS",
    "SparseDoped",
    "SparseFactorized",
    "SparseParallel",
    "Width",
    "sparse_doped",
    "sparse_factorized",
    "sparse_parallel",
    "sparse_wide",
    "transform",
]
