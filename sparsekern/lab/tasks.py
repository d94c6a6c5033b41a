"""Random crops and flips of a batch of images, on its device, decided by a generator alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

AUGMENTATIONS = ("none", "crop", "crop-flip")

MARGIN = 4
"""Pixels of padding on each side before the crop (He et al. 2016, section 4.2)."""


def augmented(images: Tensor, augmentation: str, generator: torch.Generator) -> Tensor:
    """Return every image shifted by up to 4 pixels in each direction and, with ``"crop-flip"``, mirrored or not.

    What comes in from outside is 0, the mean of standardised images.

    Args:
        images: ``(N, C, H, W)``; not changed.
        augmentation: one of :data:`AUGMENTATIONS`; ``"none"`` returns the images as they are.
        generator: on the CPU, so that every device draws alike.

    Returns:
        A tensor of the shape and dtype of ``images``, its channels last in memory if anything was drawn.
    """
    if augmentation == "none":
        return images
    count, _, height, width = images.shape
    down, right = torch.randint(2 * MARGIN + 1, (2, count, 1), generator=generator)
    rows, columns = down + torch.arange(height), right + torch.arange(width)  # (N, H), (N, W)
    if augmentation == "crop-flip":
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    at = (torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :])
    padded = pad(images, (MARGIN,) * 4).permute(0, 2, 3, 1)
    return padded[tuple(axis.to(images.device) for axis in at)].permute(0, 3, 1, 2)
