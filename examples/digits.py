"""The handwritten digits of scikit-learn, which the examples of classifiers train on."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor

Part = tuple[Tensor, Tensor]


def digits() -> tuple[Part, Part]:
    """Return training and test images ``(N, 1, 8, 8)``, float32 in [0, 1], each with its labels ``(N,)``."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    train, test = order[:1400], order[1400:]
    return (x[train], y[train]), (x[test], y[test])
