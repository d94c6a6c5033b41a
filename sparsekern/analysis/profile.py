"""The FLOPs of a forward pass, under two conventions: products only, and that of the Sparse-IFT paper's code."""

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
    """What one sparse layer, linear layer or convolution does in a forward pass.

    ``tokens`` are rows of its output, of a convolution pixels; ``elements`` those of its weight that are stored.
    """

    tokens: int
    elements: int

    @property
    def multiply_adds(self) -> int:
        """One multiplication and one addition together."""
        return self.tokens * self.elements


@dataclass(frozen=True)
class Profile:
    """The operations of one forward pass.

    Attributes:
        multiply_adds: of all products of matrices and all convolutions, those of attention included; bias, norms,
            activations and pooling are not counted. Blocks that are not stored cost nothing.
        paper_flops: under the convention of the Sparse-IFT paper's code (Thangarasa et al., ICML 2024):
            multiplications and additions, each one, of linear layers, convolutions, norms (their statistics included)
            and pooling; activations, sums of branches and the products of attention are not counted. A convolution of
            n elements takes ``2 n - 1`` a pixel there, not one less for each output.
        layers: by name, in the order in which they first run.
    """

    multiply_adds: int
    paper_flops: int
    layers: dict[str, LayerProfile]

    @property
    def flops(self) -> int:
        """Floating point operations of the products: two a multiply-add."""
        return 2 * self.multiply_adds


def arguments(sample_input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments, positional and by name, that a ``sample_input`` stands for.

    A tuple holds positional ones, a mapping (a dict, what a tokenizer returns) those by name; all else is the only one.
    """
    if isinstance(sample_input, Mapping):
        return (), dict(sample_input)
    return (sample_input if isinstance(sample_input, tuple) else (sample_input,)), {}


def profile(model: nn.Module, sample_input: Any) -> Profile:
    """Count the operations of ``model(sample_input)``, whose values play no part: it runs on the meta device.

    Args:
        model: not changed; runs in evaluation mode.
        sample_input: what the model takes: one tensor, a tuple of arguments, or a dict of them by name. ``paper_flops``
            of a batch of one are the paper's.
    """
    tokens: dict[str, int] = {}
    extra = [0]
    state = {name: t.to("meta") for name, t in [*model.named_parameters(), *model.named_buffers()]}
    # Attention in plain products, which the counter knows: not every fused kernel is.
    with (
        _hooked(model, tokens, extra),
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
    # Without data the counter takes every slot for a whole block.
    multiply_adds = counter.get_total_flops() // 2 + stored_slots
    paper = extra[0] + sum(_paper(modules[name], layer) for name, layer in layers.items())
    return Profile(multiply_adds, paper, layers)


def _paper(module: nn.Module, layer: LayerProfile) -> int:
    """Return the operations of a layer: those that save their first addition are outputs, or all pixels at once."""
    weight = module.weight
    assert isinstance(weight, (Tensor, WeightInfo))
    outputs = weight.shape[0]
    spared = outputs if len(weight.shape) == 2 else 1
    return layer.tokens * (2 * layer.elements - spared + (0 if module.bias is None else outputs))


def _paper_extra(module: nn.Module, x: Tensor, y: Tensor) -> int:
    """Return the operations of a norm or of pooling."""
    if isinstance(module, (Norm, nn.LayerNorm)):
        groups = x.shape[1] if isinstance(module, Norm) else x.shape[0]  # the code's groups of a layer norm: images
        affine = 2 if module.weight is not None else 0
        return (5 + affine) * x.numel() - groups  # two sums, a square, a difference and a quotient; a square root
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return x.numel()
    kernel = module.kernel_size
    taps = kernel**2 if isinstance(kernel, int) else kernel[0] * kernel[1]  # type: ignore[index]
    return int(y.numel() * (taps - isinstance(module, nn.MaxPool2d)))


@contextmanager
def _hooked(model: nn.Module, tokens: dict[str, int], extra: list[int]) -> Iterator[None]:
    """Count the tokens of each layer, and the rest of the paper's operations, while the model runs."""

    def counting(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            tokens[name] = tokens.get(name, 0) + output.numel() // out_features(module, output)

        return hook

    def adding(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        extra[0] += _paper_extra(module, args[0], output)

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, BlockSparse) or is_replaceable(module):
            handles.append(module.register_forward_hook(counting(name)))
        elif isinstance(module, (Norm, nn.LayerNorm, *POOLS)):
            handles.append(module.register_forward_hook(adding))
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()  # so that norm statistics stay as they are
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
