"""A decoder of text as GPT-2 and GPT-3 are built: Radford et al. 2019; Brown et al., arXiv 2005.14165, table 2.1.

By option with the parts of Llama (Touvron et al., arXiv 2302.13971): SwiGLU and rotary positions.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, scaled_dot_product_attention, silu

from sparsekern.errors import InputError
from sparsekern.lab.models.layers import Multiplier, widened
from sparsekern.nn import qkv_attention
from sparsekern.topology.arguments import check_choice

STD = 0.02
"""Of the initial weights; those whose output is added to the residual stream have ``1 / sqrt(2 * depth)`` of it."""

ACTIVATIONS = ("gelu", "swiglu")
POSITIONS = ("learnt", "rotary")


class Attention(nn.Module):
    """Causal self-attention; one linear layer makes queries, keys and values.

    Args:
        features: of the input and the output.
        heads: share the features equally.
        rotary: whether to rotate queries and keys by their positions.
    """

    def __init__(self, features: int, heads: int, rotary: bool = False) -> None:
        super().__init__()
        self.heads, self.rotary = heads, rotary
        self.qkv, self.out = nn.Linear(features, 3 * features), nn.Linear(features, features)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor like ``x (N, tokens, features)``."""
        qkv = self.qkv(x)
        if self.rotary:
            q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            attended = scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
            y = attended.transpose(1, 2).flatten(2)
        else:
            y = qkv_attention(qkv, self.heads, is_causal=True)
        out: Tensor = self.out(y)
        return out


class MLP(nn.Module):
    """The feed-forward: GELU between two layers, or SwiGLU with two thirds of the hidden features.

    SwiGLU (Shazeer, arXiv 2002.05202) multiplies a part that went through SiLU by one that did not; ``fc1`` makes both.
    """

    def __init__(self, features: int, swiglu: bool = False) -> None:
        super().__init__()
        self.swiglu = swiglu
        hidden = max(1, round(8 * features / 3 / 32)) * 32 if swiglu else 4 * features  # whole blocks
        self.fc1 = nn.Linear(features, 2 * hidden if swiglu else hidden)
        self.fc2 = nn.Linear(hidden, features)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor like ``x (N, tokens, features)``."""
        hidden = self.fc1(x)
        if self.swiglu:
            gate, value = hidden.chunk(2, -1)
            hidden = silu(gate) * value
        else:
            hidden = gelu(hidden)  # exact, as nanoGPT's; on a CPU the approximation by tanh takes twice as long
        y: Tensor = self.fc2(hidden)
        return y


class Layer(nn.Module):
    """Attention and feed-forward, each of the normalised input and added to it."""

    def __init__(self, features: int, heads: int, *, swiglu: bool, rotary: bool) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(features), Attention(features, heads, rotary)
        self.norm2, self.mlp = nn.LayerNorm(features), MLP(features, swiglu)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor like ``x (N, tokens, features)``."""
        x = x + self.attention(self.norm1(x))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class GPT(nn.Module):
    """Embeddings of tokens and positions, layers, and a head.

    Args:
        vocabulary: number of tokens.
        context: tokens of the longest text.
        depth, heads, head_features: the network, ``heads * head_features`` features wide.
        activation: of the feed-forward, ``"gelu"`` or ``"swiglu"``.
        positions: ``"learnt"``, an embedding added to that of the tokens; or ``"rotary"``, in every attention.
        tied: whether the head's weight is the token embedding.
        width_multiplier: times the heads; a head stays as wide as it is.

    Raises:
        ValueError: an unknown activation or kind of positions; rotary positions with an odd ``head_features``.
    """

    def __init__(
        self,
        vocabulary: int,
        context: int,
        *,
        depth: int,
        heads: int,
        head_features: int,
        activation: str = "gelu",
        positions: str = "learnt",
        tied: bool = True,
        width_multiplier: Multiplier = 1.0,
    ) -> None:
        super().__init__()
        for name, value, known in (("activation", activation, ACTIVATIONS), ("positions", positions, POSITIONS)):
            check_choice(name, value, known)
        if positions == "rotary" and head_features % 2:
            raise InputError(
                f"head_features is {head_features}; rotary positions need an even number", parameter="head_features"
            )
        heads = max(1, round(widened(heads * head_features, width_multiplier) / head_features))
        features = heads * head_features
        self.context = context
        self.tokens = nn.Embedding(vocabulary, features)
        self.places = nn.Embedding(context, features) if positions == "learnt" else None
        self.layers = nn.Sequential(
            *(Layer(features, heads, swiglu=activation == "swiglu", rotary=self.places is None) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(features)
        self.head = None if tied else nn.Linear(features, vocabulary, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                added = name.endswith(("out.weight", "fc2.weight"))
                nn.init.normal_(parameter, std=STD / (2 * depth) ** 0.5 if added else STD)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits ``(N, tokens, vocabulary)`` of what follows each of ``tokens (N, tokens)``, int64."""
        x = self.tokens(tokens)
        if self.places is not None:
            x = x + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        x = self.norm(self.layers(x))
        logits: Tensor = linear(x, self.tokens.weight) if self.head is None else self.head(x)
        return logits


def rotated(x: Tensor) -> Tensor:
    """Rotate pairs of features by angles that grow with the position: Su et al., "RoFormer", arXiv 2104.09864.

    Args:
        x: queries or keys ``(..., tokens, head_features)``; feature ``i`` of the first half is paired with the same of
            the second half, as in GPT-NeoX and Llama.

    Returns:
        A tensor like x.
    """
    tokens, features = x.shape[-2:]
    waves = 10_000 ** (-torch.arange(0, features, 2, device=x.device) / features)
    angles = torch.arange(tokens, device=x.device)[:, None] * waves
    sine, cosine = angles.sin().to(x.dtype), angles.cos().to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1)


@torch.no_grad()
def generate(model: GPT, prompt: Tensor, count: int, *, temperature: float = 1.0, seed: int = 0) -> Tensor:
    """Continue a text, token by token, each drawn from what the model expects.

    Args:
        model: the network; sees the last ``model.context`` tokens.
        prompt: ``(tokens,)`` int64, at least one.
        count: of tokens to add.
        temperature: below 1 likelier tokens become likelier still; 0 takes the likeliest.
        seed: decides the draws.

    Returns:
        The tokens added, ``(count,)`` int64.
    """
    generator = torch.Generator(device=prompt.device).manual_seed(seed)
    text, training = prompt, model.training
    model.eval()
    for _ in range(count):
        logits = model(text[None, -model.context :])[0, -1].float()
        if temperature > 0:
            token = torch.multinomial((logits / temperature).softmax(0), 1, generator=generator)
        else:
            token = logits.argmax(0, keepdim=True)
        text = torch.cat((text, token))
    model.train(training)
    return text[prompt.shape[0] :]


HEAD_FEATURES = 64
"""Of a head of the networks below, as in GPT-2."""


def gpt(vocabulary: int, context: int, width: int, *, depth: int, free_head: bool = False, **options: str) -> GPT:
    """Return a network with heads of 64 features; a ``width`` that is no multiple of it is rounded to whole heads.

    Args:
        vocabulary, context, depth: see :class:`GPT`.
        width: see above.
        free_head: whether the head has a weight of its own.
        options: ``activation`` and ``positions``.
    """
    heads = max(1, round(width / HEAD_FEATURES))
    sizes = {"depth": depth, "heads": heads, "head_features": HEAD_FEATURES}
    return GPT(vocabulary, context, tied=not free_head, **sizes, **options)  # type: ignore[arg-type]


gpt_small = partial(GPT, 50257, 1024, depth=12, heads=12, head_features=HEAD_FEATURES)
"""GPT-2 small, which is GPT-3 small with a shorter context: 124 M parameters."""
