"""Weights on disk: saving and loading models, reading other people's files, converting between formats."""

from sparsekern.files.saving import load_, save

__all__ = ["load_", "save"]
