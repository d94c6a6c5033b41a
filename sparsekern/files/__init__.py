"""Weights on disk: saving, loading and converting them."""

from sparsekern.files.saving import load_, save

__all__ = ["load_", "save"]
