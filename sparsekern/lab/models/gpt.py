"""A decoder of text as GPT-2 and GPT-3 are built: Radford et al. 2019; Brown et al., arXiv 2005.14165, table 2.1."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, scaled_dot_product_attention

from sparsekern.lab.models.layers import Multiplier, widened

STD = 0.02
"""Of the initial weights; those whose output is added to the residual stream have ``1 / sqrt(2 * depth)`` of it."""


class Layer(nn.Module):
    """Causal self-attention and a feed-forward with GELU, each of the normalised input and added to it."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(features), nn.LayerNorm(features)
        self.qkv, self.out = nn.Linear(features, 3 * features), nn.Linear(features, features)
        self.fc1, self.fc2 = nn.Linear(features, 4 * features), nn.Linear(4 * features, features)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor like ``x (N, tokens, features)``."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        y: Tensor = x + self.fc2(gelu(self.fc1(self.norm2(x)), approximate="tanh"))
        return y


class GPT(nn.Module):
    """Embeddings of tokens and places, layers, and a head whose weight is the token embedding.

    Args:
        vocabulary: tokens there are.
        context: tokens of the longest text.
        depth, heads, head_features: the network, ``heads * head_features`` features wide.
        width_multiplier: times the heads; a head stays as wide as it is.
    """

    def __init__(
        self,
        vocabulary: int,
        context: int,
        *,
        depth: int,
        heads: int,
        head_features: int,
        width_multiplier: Multiplier = 1.0,
    ) -> None:
        super().__init__()
        heads = max(1, round(widened(heads * head_features, width_multiplier) / head_features))
        features = heads * head_features
        self.tokens, self.places = nn.Embedding(vocabulary, features), nn.Embedding(context, features)
        self.layers = nn.Sequential(*(Layer(features, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(features)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                added = name.endswith(("out.weight", "fc2.weight"))
                nn.init.normal_(parameter, std=STD / (2 * depth) ** 0.5 if added else STD)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits ``(N, tokens, vocabulary)`` of what follows each of ``tokens (N, tokens)``, int64."""
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        return linear(self.norm(self.layers(x)), self.tokens.weight)


def gpt_small(vocabulary: int = 50257, context: int = 1024, width_multiplier: Multiplier = 1.0) -> GPT:
    """Return GPT-2 small, which is GPT-3 small with a shorter context: 124 M parameters."""
    return GPT(vocabulary, context, depth=12, heads=12, head_features=64, width_multiplier=width_multiplier)
