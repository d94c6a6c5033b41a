"""A sparse GPT in a plain PyTorch loop, its dense twin beside it: bits per byte of held-out text, and time a step.

python examples/gpt.py --steps 500
"""

from __future__ import annotations

import argparse
import math
import time

import torch
from text import batch, standard_library
from torch import Tensor, nn
from torch.nn import functional as F

import sparsekern as sk

CONTEXT = 128


class Block(nn.Module):
    """Causal attention and a feed-forward, each of its normalised input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projection(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    """A decoder of bytes."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, max(1, width // 64)) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, text: Tensor) -> Tensor:
        x = self.bytes(text) + self.places.weight[: text.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def loss(model: nn.Module, text: Tensor) -> Tensor:
    """Return the mean loss of each byte from those before it."""
    return F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())


def train(sparse: bool, steps: int, width: int, depth: int) -> dict[str, float]:
    """Train one network; return bits per byte of held-out text, milliseconds a step, and parameters."""
    train_text, test_text = standard_library()
    torch.manual_seed(0)
    model = GPT(width, depth)
    if sparse:  # before the optimizer; the head and the embeddings stay dense
        sparsity = {"*.up": 0.9, "*.down": 0.9, "*": 0.7}
        sk.sparsify_(model, sparsity, block_size=16, ignore="head")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3 if sparse else 1e-3, steps, pct_start=0.1)
    method = sk.RigL(model, optimizer, update_every=50, stop=0.75 * steps) if sparse else None
    began = time.perf_counter()
    for step in range(steps):
        loss(model, batch(train_text, CONTEXT, 16, step)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if method is not None:
            method.step()
    seconds = time.perf_counter() - began
    with torch.no_grad():
        model.eval()
        tests = [loss(model, batch(test_text, CONTEXT, 16, seed)).item() for seed in range(10)]
    bits = sum(tests) / len(tests) / math.log(2)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"bits per byte": bits, "ms a step": 1000 * seconds / steps, "parameters": parameters}


def main(steps: int = 500, width: int = 384, depth: int = 6) -> dict[str, dict[str, float]]:
    """Train both and print what they reached."""
    found = {name: train(name == "sparse", steps, width, depth) for name in ("sparse", "dense")}
    for name, row in found.items():
        print(f"{name:7}" + "".join(f"{value:12,.2f} {key}" for key, value in row.items()))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=6)
    main(**vars(parser.parse_args()))
