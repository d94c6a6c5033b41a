"""The FLOPs of a forward pass: of products only, and by the convention of the Sparse-IFT paper's code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from sparsekern.nn import BlockSparse, WeightInfo, is_replaceable
from sparsekern.nn.converters import out_features

Norm = nn.modules.batchnorm._BatchNorm
POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)


@dataclass(frozen=True)
class LayerProfile:
    """One sparse layer, linear layer or convolution in a forward pass.

    ``tokens`` counts the rows of its output, or the pixels of a convolution; ``elements`` the stored elements of its
    weight.
    """

    tokens: int
    elements: int

    @property
    def multiply_adds(self) -> int:
        """The multiply-adds: one multiplication and one addition each."""
        return self.tokens * self.elements


@dataclass(frozen=True)
class Profile:
    """The operations of one forward pass.

    Attributes:
        multiply_adds: multiply-adds of all matrix products and convolutions, including attention, without bias, norms,
            activations and pooling. Blocks that are not stored cost nothing.
        paper_flops: FLOPs by the convention of the Sparse-IFT paper's code (Thangarasa et al., ICML 2024): the
            multiplications and additions of linear layers, convolutions, norms (with their statistics) and pooling,
            without activations, sums of branches and the products of attention. A convolution of n elements takes
            ``2 n - 1`` per pixel there, not one less for each output.
        layers: the layers by name, in the order in which they first run.
    """

    multiply_adds: int
    paper_flops: int
    layers: dict[str, LayerProfile]

    @property
    def flops(self) -> int:
        """The floating point operations of the products: two per multiply-add."""
        return 2 * self.multiply_adds


def arguments(sample_input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments of a ``sample_input``.

    A tuple holds positional arguments, a mapping (a dict, or what a tokenizer returns) keyword arguments; anything else
    is the only argument.
    """
    if isinstance(sample_input, Mapping):
        return (), dict(sample_input)
    return (sample_input if isinstance(sample_input, tuple) else (sample_input,)), {}


def profile(model: nn.Module, sample_input: Any) -> Profile:
    """Count the operations of ``model(sample_input)``, run on the meta device in evaluation mode.

    Args:
        model: the model; not changed.
        sample_input: a tensor, a tuple of arguments, or a dict of keyword arguments. For the paper's ``paper_flops``,
            a batch of one.
    """
    tokens: dict[str, int] = {}
    extra = [0]

    def counting(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            tokens[name] = tokens.get(name, 0) + output.numel() // out_features(module, output)

        return hook

    def adding(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        extra[0] += _paper_extra(module, args[0], output)

    hooks: dict[nn.Module, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, BlockSparse) or is_replaceable(module):
            hooks[module] = counting(name)
        elif isinstance(module, (Norm, nn.LayerNorm, *POOLS)):
            hooks[module] = adding
    state = {name: t.to("meta") for name, t in [*model.named_parameters(), *model.named_buffers()]}
    # Attention as plain products, because the counter does not know every fused kernel.
    with (
        hooked(model, hooks),
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), arguments(sample_input))
        torch.func.functional_call(model, state, args, kwargs, tie_weights=True)
    layers, stored_slots = {}, 0
    modules = dict(model.named_modules())
    for name, count in tokens.items():
        module = modules[name]
        if isinstance(module, BlockSparse):
            layers[name] = LayerProfile(count, module.topology.elements())
            stored_slots += count * (layers[name].elements - module.values.numel())
        else:
            assert isinstance(module.weight, Tensor)
            layers[name] = LayerProfile(count, module.weight.numel())
    # On the meta device the counter takes every slot for a whole block.
    multiply_adds = counter.get_total_flops() // 2 + stored_slots
    paper = extra[0] + sum(_paper(modules[name], layer) for name, layer in layers.items())
    return Profile(multiply_adds, paper, layers)


def _paper(module: nn.Module, layer: LayerProfile) -> int:
    """Return the operations of a layer by the paper's convention, which subtracts one addition per output or pixel."""
    weight = module.weight
    assert isinstance(weight, (Tensor, WeightInfo))
    outputs = weight.shape[0]
    spared = outputs if len(weight.shape) == 2 else 1
    return layer.tokens * (2 * layer.elements - spared + (0 if module.bias is None else outputs))


def _paper_extra(module: nn.Module, x: Tensor, y: Tensor) -> int:
    """Return the operations of a norm or of pooling by the paper's convention."""
    if isinstance(module, (Norm, nn.LayerNorm)):
        groups = x.shape[1] if isinstance(module, Norm) else x.shape[0]  # images, for a layer norm
        affine = 2 if module.weight is not None else 0
        return (5 + affine) * x.numel() - groups  # two sums, a square, a difference, a quotient; a root per group
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return x.numel()
    kernel = module.kernel_size
    taps = kernel**2 if isinstance(kernel, int) else kernel[0] * kernel[1]  # type: ignore[index]
    return int(y.numel() * (taps - isinstance(module, nn.MaxPool2d)))


@contextmanager
def hooked(model: nn.Module, hooks: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Put a model into evaluation mode with forward hooks; restore both afterwards.

    Args:
        model: the model; in evaluation mode, the statistics of norms do not change.
        hooks: for each module a function ``(module, args, kwargs, output)``.
    """
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in hooks.items()]
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
