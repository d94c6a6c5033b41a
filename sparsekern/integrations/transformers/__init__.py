"""Hugging Face Transformers: sparse models in its files, its Trainer and its models.

Importing this registers the format of sparse models with Transformers, so that ``from_pretrained`` knows it, and
GPT-2's ``Conv1D`` with :func:`sparsekern.sparsify_`.
"""

from typing import TYPE_CHECKING, Any

from sparsekern.integrations.transformers.files import SparseConfig, SparseQuantizer, model_card, settle
from sparsekern.integrations.transformers.layers import register_layers, stays_dense

if TYPE_CHECKING:
    from sparsekern.integrations.transformers.training import SparseCallback, SparseTrainer

register_layers()

__all__ = [
    "SparseCallback",
    "SparseConfig",
    "SparseQuantizer",
    "SparseTrainer",
    "model_card",
    "settle",
    "stays_dense",
]


def __getattr__(name: str) -> Any:
    """Import the Trainer, which takes seconds and needs accelerate, where it is asked for."""
    if name in ("SparseCallback", "SparseTrainer"):
        from sparsekern.integrations.transformers import training

        return getattr(training, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
