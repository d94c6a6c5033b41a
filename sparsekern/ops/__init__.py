"""The operators: checks, choice of backend, autograd, probes. Registered as ``torch.ops.sparsekern``."""

from sparsekern.ops import onnx as _onnx  # noqa: F401  enters decompositions into PyTorch's table
from sparsekern.ops.attention import qkv_attention
from sparsekern.ops.backends import BACKENDS, backend, requested_backend, supports
from sparsekern.ops.flops import stored_elements
from sparsekern.ops.norms import batch_norm_relu, fuses_batch_norm_relu
from sparsekern.ops.probes import Probe
from sparsekern.ops.products import conv2d, linear
from sparsekern.ops.scores import all_block_norms, block_norms, sketch

__all__ = [
    "BACKENDS",
    "Probe",
    "all_block_norms",
    "backend",
    "batch_norm_relu",
    "block_norms",
    "conv2d",
    "fuses_batch_norm_relu",
    "linear",
    "qkv_attention",
    "requested_backend",
    "sketch",
    "stored_elements",
    "supports",
]
