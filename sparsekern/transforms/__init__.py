"""Sparse-IFT: larger sparse layers with the FLOPs of a dense layer (Thangarasa et al., ICML 2024)."""

from sparsekern.transforms.doped import SparseDoped, sparse_doped
from sparsekern.transforms.factorized import SparseFactorized, sparse_factorized
from sparsekern.transforms.network import TRANSFORMS, transform
from sparsekern.transforms.parallel import SparseParallel, sparse_parallel
from sparsekern.transforms.sizes import Width
from sparsekern.transforms.wide import sparse_wide

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
