"""The networks: a dense multi-layer perceptron, and the same with sparse hidden layers."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

import sparsekern as sk
from sparsekern.recipes.config import Config
from sparsekern.topology import generator_for

KEPT_DENSE = ("input", "output")
"""The first and the last layer hold few weights, and sparse ones cost accuracy."""


def dense_mlp(features: int, width: int, classes: int, seed: int) -> nn.Sequential:
    """Return ``features -> width -> width -> width -> classes`` with ReLU between, on the CPU.

    PyTorch's own initial values, decided by the seed alone: the global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator_for(seed, "mlp").initial_seed())
        return nn.Sequential(
            OrderedDict(
                input=nn.Linear(features, width),
                relu0=nn.ReLU(),
                hidden1=nn.Linear(width, width),
                relu1=nn.ReLU(),
                hidden2=nn.Linear(width, width),
                relu2=nn.ReLU(),
                output=nn.Linear(width, classes),
            )
        )


def build(network: str, config: Config, features: int, classes: int, seed: int) -> nn.Module:
    """Return the network of a run by its name, ``"sparse"`` or ``"dense"``, on the CPU.

    The two have the same first and last layer; the sparse one's hidden layers are drawn anew.

    Raises:
        ValueError: the sparsity leaves a hidden layer without a block.
    """
    model = dense_mlp(features, config.width, classes, seed)
    if network == "dense":
        return model
    return sk.sparsify_(model, config.sparsity, config.block_size, ignore=KEPT_DENSE, seed=seed)
