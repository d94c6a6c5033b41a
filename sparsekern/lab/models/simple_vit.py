"""SimpleViT: Beyer, Zhai and Kolesnikov, "Better plain ViT baselines for ImageNet-1k", arXiv 2205.01580."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from sparsekern.errors import InputError
from sparsekern.lab.models.layers import Multiplier, widened
from sparsekern.nn import qkv_attention

TEMPERATURE = 10_000
"""Ratio of the longest wave of the position embedding to the shortest."""


def positions(rows: int, columns: int, features: int) -> Tensor:
    """Return sines and cosines of the two coordinates of each patch, ``(rows * columns, features)``, float32.

    Raises:
        ValueError: features is no multiple of 4, or 4 itself.
    """
    if features % 4 or features < 8:
        raise InputError(f"features is {features}; it must be a multiple of 4, and 8 or more", parameter="features")
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    waves = TEMPERATURE ** -(torch.arange(features // 4) / (features // 4 - 1))
    y, x = (coordinate.reshape(-1, 1) * waves for coordinate in (row, column))
    return torch.cat((x.sin(), x.cos(), y.sin(), y.cos()), dim=1)


class Attention(nn.Module):
    """Self-attention of the normalised input, with ordinary linear layers that ``sparsify_`` can take."""

    def __init__(self, features: int, heads: int, head_features: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(features)
        self.qkv = nn.Linear(features, 3 * heads * head_features)
        self.out = nn.Linear(heads * head_features, features)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor like ``x (N, tokens, features)``."""
        y: Tensor = self.out(qkv_attention(self.qkv(self.norm(x)), self.heads))
        return y


class FeedForward(nn.Module):
    """Two linear layers with GELU between, of the normalised input."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.fc1, self.fc2 = nn.Linear(features, hidden), nn.Linear(hidden, features)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor like ``x (N, tokens, features)``."""
        y: Tensor = self.fc2(gelu(self.fc1(self.norm(x))))
        return y


class Layer(nn.Module):
    """Attention and feed-forward, each added to its input."""

    def __init__(self, features: int, heads: int, head_features: int, hidden: int) -> None:
        super().__init__()
        self.attention = Attention(features, heads, head_features)
        self.feed_forward = FeedForward(features, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor like ``x (N, tokens, features)``."""
        x = x + self.attention(x)
        y: Tensor = x + self.feed_forward(x)
        return y


class SimpleViT(nn.Module):
    """Patches, fixed position embedding, layers with the norm first, average pooling, a linear layer.

    Args:
        num_classes: outputs.
        in_channels: of the images ``(N, in_channels, H, W)``.
        image_size: ``(H, W)``, multiples of ``patch``.
        patch, depth, features, heads, head_features, hidden: the network; ``hidden`` of the feed-forward.
        width_multiplier: times the features, the heads and ``hidden``; a head stays as wide as it is.

    Raises:
        ValueError: the image is not a whole number of patches, or the features are no multiple of 4.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        image_size: tuple[int, int] = (32, 32),
        width_multiplier: Multiplier = 1.0,
        *,
        patch: int,
        depth: int,
        features: int,
        heads: int,
        head_features: int,
        hidden: int,
    ) -> None:
        super().__init__()
        if image_size[0] % patch or image_size[1] % patch:
            raise InputError(
                f"image_size is {image_size}; both sides must be multiples of the patch, {patch}",
                parameter="image_size",
            )
        features, inside, hidden = (widened(n, width_multiplier) for n in (features, heads * head_features, hidden))
        heads = max(1, round(inside / head_features))
        self.patch = patch
        self.embed = nn.Linear(in_channels * patch**2, features)
        place = positions(image_size[0] // patch, image_size[1] // patch, features)
        self.register_buffer("place", place, persistent=False)
        self.layers = nn.Sequential(*(Layer(features, heads, head_features, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(features)
        self.head = nn.Linear(features, num_classes)
        _init_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``(N, num_classes)``."""
        side = self.patch
        x = x.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # (N, C, rows, side, columns, side)
        x = self.embed(x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)) + self.place
        logits: Tensor = self.head(self.norm(self.layers(x)).mean(1))
        return logits


def _init_(model: SimpleViT) -> None:
    """Draw the linear layers as the authors' code does: Xavier, LeCun for the patches, a head and biases of zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.trunc_normal_(model.embed.weight, std=math.sqrt(1 / model.embed.in_features))
    nn.init.zeros_(model.head.weight)


simplevit_tiny = partial(SimpleViT, patch=4, depth=4, features=512, heads=6, head_features=64, hidden=256)
"""The small SimpleViT of the GSE paper (Heddes et al., arXiv 2401.06898): 4.3 M parameters for 10 classes."""
