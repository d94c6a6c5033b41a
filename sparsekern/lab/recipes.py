"""Recipes: a network, how it is trained, and the source of both. Lengths are fractions of the training.

Published networks were dense or sparse in single weights: block sizes are ours throughout. The sources:

* He 2016: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016.
* Zagoruyko 2016: Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016, arXiv 1605.07146.
* Evci 2020: Evci et al., "Rigging the Lottery" (RigL), ICML 2020, arXiv 1911.11134.
* Liu 2021: Liu et al., "Do We Actually Need Dense Over-Parameterization?" (ITOP), ICML 2021, arXiv 2102.02887.
* Beyer 2022: Beyer et al., "Better plain ViT baselines for ImageNet-1k" (SimpleViT), arXiv 2205.01580.
* Heddes 2024: Heddes et al., "Always-Sparse Training by Growing Connections with Guided Stochastic Exploration" (GSE),
  arXiv 2401.06898.
* Karpathy 2022: Karpathy, "nanoGPT", github.com/karpathy/nanoGPT, config/train_shakespeare_char.py.
* Zhou 2021: Zhou et al., "Efficient Neural Network Training via Forward and Backward Propagation Sparsification"
  (VR-PGE), NeurIPS 2021, arXiv 2111.05685; its settings are those of the released code.
* Thangarasa 2024: Thangarasa et al., "Sparse-IFT", ICML 2024, arXiv 2303.11525.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from sparsekern.errors import InputError
from sparsekern.lab import models
from sparsekern.lab.language import Language
from sparsekern.lab.models.gpt import HEAD_FEATURES
from sparsekern.lab.schedules import Constant, Cosine, FineTuning, Milestones
from sparsekern.lab.tasks import Classification, Task

# fused: on a CPU the default forms are slow, most of all for the dense twin, and would flatter the sparse network


@dataclass(frozen=True)
class Optimizer:
    """An optimizer of PyTorch with its arguments, but for the rate.

    Attributes:
        kind: the class.
        weight_decay: as the class takes it: decoupled in AdamW, a part of the gradient in SGD.
        decay_all: whether norms and biases decay too.
        arguments: others of the class.
    """

    kind: Callable[..., torch.optim.Optimizer]
    weight_decay: float
    decay_all: bool
    arguments: Mapping[str, Any]

    def build(self, model: nn.Module, rate: float, *, fused: bool = True) -> torch.optim.Optimizer:
        """Return the optimizer of a model's parameters; ``fused`` is not for sharded ones."""
        groups = parameter_groups(model, self.weight_decay, decay_all=self.decay_all)
        return self.kind(groups, lr=rate, fused=fused, **self.arguments)


def adamw(weight_decay: float = 0.01, *, decay_all: bool = True, **arguments: Any) -> Optimizer:
    """Return AdamW."""
    return Optimizer(torch.optim.AdamW, weight_decay, decay_all, arguments)


def sgd(weight_decay: float, *, decay_all: bool = True, momentum: float = 0.9, nesterov: bool = False) -> Optimizer:
    """Return stochastic gradient descent with momentum."""
    return Optimizer(torch.optim.SGD, weight_decay, decay_all, {"momentum": momentum, "nesterov": nesterov})


def parameter_groups(model: nn.Module, weight_decay: float, *, decay_all: bool) -> list[dict[str, Any]]:
    """Return the groups for an optimizer: one, or one of weights that decay and one of norms and biases that do not.

    Norms and biases are what has one axis; the ``values`` of a sparse layer have three, also in blocks of 1x1.
    """
    parameters = list(model.parameters())
    if decay_all:
        return [{"params": parameters, "weight_decay": weight_decay}]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


@dataclass(frozen=True)
class Recipe:
    """A network and how to train it. What :class:`~sparsekern.lab.Config` also has is its default there.

    Attributes:
        name: for ``--recipe``.
        title: of the network.
        source: of the training; that of the network is in its file.
        model: makes the dense network from the task's arguments (of images ``num_classes`` and ``in_channels``) and
            ``width_multiplier``.
        kept_dense: names of the layers that stay dense: they hold few weights, and sparse ones cost accuracy.
        optimizer: and its weight decay.
        schedule: of the learning rate.
        epochs: passes over the training set; None where the size of the data decides.
        distribution: how the blocks are shared out among the layers.
        init_scale: of the values of sparse layers, as in :func:`sparsekern.sparsify_`.
        update_every: steps between moves of blocks, at most.
        label_smoothing: part of the target that all classes share.
        clip_norm: to which the norm of all gradients is cut; None for no bound.
        augmentation: of colour images. In grey ones, such as digits, a mirror image may mean something else.
        width: features of the hidden layers, given in place of ``width_multiplier``.
        width_step: of which the width must be a multiple.
        sparsity: of the sparse layers, or of each kind of them.
        kinds: a glob of the names of the layers of each kind that may have a sparsity of its own. Only such layers are
            sparse then, and of these only the kinds in ``sparsity`` where one number is given for all. Empty: there is
            one kind, all layers but ``kept_dense``.
        network: options of the network besides its width, with their defaults:
            :data:`sparsekern.lab.options.NETWORK_OPTIONS`.
        needs_image_size: whether ``model`` takes ``image_size``, too.
        smallest_image: pixels that each side of an image must have.
        channels_last: whether weights and images have their channels last in memory, which convolutions want.
        task: what the network is trained on.
    """

    name: str
    title: str
    source: str
    model: Callable[..., nn.Module]
    kept_dense: tuple[str, ...]
    optimizer: Optimizer
    rate: float
    schedule: Constant
    batch_size: int
    epochs: int | None
    block_size: int = 16
    distribution: str = "erk"
    init_scale: float | str = 1.0
    update_every: int = 100
    label_smoothing: float = 0.0
    clip_norm: float | None = None
    augmentation: str = "crop-flip"
    seeds: int = 1
    width: int | None = None
    width_step: int = 1
    sparsity: float | Mapping[str, float] = 0.9
    kinds: Mapping[str, str] = field(default_factory=dict)
    network: Mapping[str, Any] = field(default_factory=dict)
    needs_image_size: bool = False
    smallest_image: int = 1
    channels_last: bool = True
    task: type[Task] = Classification


_RESNET20 = Recipe(  # 64 000 steps, the rate divided by 10 twice
    "resnet20",
    "ResNet-20",
    "He 2016, section 4.2",
    models.resnet20,
    kept_dense=("conv1", "fc"),
    optimizer=sgd(weight_decay=1e-4),
    rate=0.1,
    schedule=Milestones((0.5, 0.75), 0.1),
    batch_size=128,
    epochs=164,
)

_WIDE = Recipe(  # without dropout
    "wrn-28-4",
    "WRN-28-4",
    "Zagoruyko 2016 (WRN)",
    models.wrn_28_4,
    kept_dense=("conv1", "fc"),
    optimizer=sgd(weight_decay=5e-4, nesterov=True),
    rate=0.1,
    schedule=Milestones((0.3, 0.6, 0.8), 0.2),
    batch_size=128,
    epochs=200,
)

_VGG16 = Recipe(  # their network has two linear layers more
    "vgg16",
    "VGG-16 with batch norm",
    "Liu 2021 (ITOP)",
    models.vgg16,
    kept_dense=("features.0", "fc"),
    optimizer=sgd(weight_decay=5e-4, nesterov=True),
    rate=0.1,
    schedule=Milestones((0.5, 0.75), 0.1),
    batch_size=128,
    epochs=250,
    block_size=32,
    smallest_image=32,
)

_VGG16_SMALL = Recipe(
    "vgg16-small",
    "VGG-16 of a quarter of the width",
    "Heddes 2024 (GSE)",
    models.vgg16_small,
    kept_dense=("features.0", "fc"),
    optimizer=sgd(weight_decay=1e-4),
    rate=0.1,
    schedule=Milestones((0.4, 0.6), 0.1, warm_up=0.025),
    batch_size=128,
    epochs=200,
    distribution="er",
    update_every=1000,
    smallest_image=32,
)

_GPT = Recipe(  # the optimizer and schedule of nanoGPT, and the sparsities of SparseLab's demo
    "gpt",
    "GPT",
    "Karpathy 2022 (nanoGPT)",
    models.gpt,
    kept_dense=(),
    optimizer=adamw(weight_decay=0.1, decay_all=False, betas=(0.9, 0.99)),
    rate=1e-3,
    schedule=Cosine(warm_up=0.05, floor=0.1),
    batch_size=16,
    epochs=20,
    distribution="uniform",
    init_scale="dense",
    clip_norm=1.0,
    augmentation="none",
    width=384,
    width_step=HEAD_FEATURES,
    sparsity={"mlp": 0.9, "attention": 0.7},
    kinds={"mlp": "*.mlp.*", "attention": "*.attention.*", "head": "head"},
    network={"depth": 6, "context": 128, "activation": "gelu", "positions": "learnt", "free_head": False},
    channels_last=False,
    task=Language,
)

_ALL = (
    Recipe(  # AdamW's settings are PyTorch's; the rest was tried on the digits
        "mlp",
        "MLP",
        "ours, for the bundled digits",
        models.mlp,
        kept_dense=("input", "output"),
        optimizer=adamw(),
        rate=1e-3,
        schedule=Constant(),
        batch_size=64,
        epochs=None,
        distribution="uniform",
        augmentation="none",
        seeds=5,
        width=2048,
        needs_image_size=True,
        channels_last=False,
    ),
    _RESNET20,
    replace(_RESNET20, name="resnet56", title="ResNet-56", model=models.resnet56),
    replace(  # their training on CIFAR-100, which is that of the wide network
        _WIDE,
        name="resnet18-cifar",
        title="ResNet-18 with a 3x3 stem",
        source="Thangarasa 2024 (Sparse-IFT)",
        model=models.resnet18_cifar,
        block_size=32,
        distribution="uniform",
    ),
    Recipe(  # their training on ImageNet, without random resized crops: images come in one size here
        "resnet18",
        "ResNet-18",
        "Thangarasa 2024 (Sparse-IFT)",
        models.resnet18,
        kept_dense=("conv1", "fc"),
        optimizer=sgd(weight_decay=3.05e-5, momentum=0.875, decay_all=False),
        rate=0.256,
        schedule=Cosine(),
        batch_size=256,
        epochs=90,
        block_size=32,
        distribution="uniform",
        label_smoothing=0.1,
    ),
    Recipe(  # theirs on ImageNet: 4096 images a step at a rate of 1.6, here in proportion; crops as above
        "resnet50",
        "ResNet-50",
        "Evci 2020 (RigL)",
        models.resnet50,
        kept_dense=("conv1", "fc"),
        optimizer=sgd(weight_decay=1e-4, decay_all=False),
        rate=0.1,
        schedule=Milestones((0.3, 0.7, 0.9), 0.1, warm_up=0.05),
        batch_size=256,
        epochs=100,
        block_size=32,
        label_smoothing=0.1,
    ),
    _WIDE,
    replace(
        _WIDE,
        name="wrn-22-2",
        title="WRN-22-2",
        source="Evci 2020 (RigL)",
        model=models.wrn_22_2,
        optimizer=sgd(weight_decay=5e-4, decay_all=False, nesterov=True),
        init_scale="dense",
        schedule=Milestones((30 / 97.75, 60 / 97.75, 90 / 97.75), 0.2),  # thousands of steps
        epochs=250,
    ),
    _VGG16,
    replace(
        _VGG16,
        name="resnet34-cifar",
        title="ResNet-34 with a 3x3 stem",
        model=models.resnet34_cifar,
        kept_dense=("conv1", "fc"),
        init_scale="dense",
        smallest_image=1,
    ),
    Recipe(  # 300 epochs to learn which filters stay, and 40 of fine-tuning
        "resnet32-double",
        "ResNet-32 of twice the width",
        "Zhou 2021 (VR-PGE)",
        models.resnet32_double,
        kept_dense=("conv1", "fc"),
        optimizer=sgd(weight_decay=5e-4),
        rate=0.1,
        schedule=FineTuning(Cosine(), 300 / 340, 0.01),
        batch_size=256,
        epochs=340,
        init_scale="dense",
    ),
    _VGG16_SMALL,
    replace(
        _VGG16_SMALL,
        name="resnet56-gse",
        title="ResNet-56",
        model=models.resnet56,
        kept_dense=("conv1", "fc"),
        smallest_image=1,
    ),
    replace(
        _VGG16_SMALL,
        name="simplevit-gse",
        title="SimpleViT-tiny",
        model=models.simplevit_tiny,
        kept_dense=("embed", "head"),
        rate=0.01,
        smallest_image=1,
        needs_image_size=True,
        channels_last=False,
    ),
    Recipe(
        # Without RandAugment and mixup. Theirs decays a weight by 1e-4 of it a step, whatever the rate: PyTorch
        # multiplies the 0.1 by the rate of 1e-3. Blocks are shared out as in Heddes 2024.
        "simplevit-tiny",
        "SimpleViT-tiny",
        "Beyer 2022 (SimpleViT)",
        models.simplevit_tiny,
        kept_dense=("embed", "head"),
        optimizer=adamw(weight_decay=0.1, decay_all=False),
        rate=1e-3,
        schedule=Cosine(warm_up=0.09),
        batch_size=1024,
        epochs=90,
        block_size=32,
        distribution="er",
        clip_norm=1.0,
        needs_image_size=True,
        channels_last=False,
    ),
    _GPT,
    replace(
        _GPT,
        name="gpt-nano",
        title="GPT-nano",
        width=128,
        epochs=8,
        network={**_GPT.network, "depth": 3, "context": 64},
    ),
)

RECIPES = {recipe.name: recipe for recipe in _ALL}
"""All recipes by name; the first one is the default."""


def find(name: str) -> Recipe:
    """Return a recipe by its name.

    Raises:
        ValueError: there is none; the text names the nearest.
    """
    if name in RECIPES:
        return RECIPES[name]
    near = difflib.get_close_matches(str(name), RECIPES, n=2, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(RECIPES)}"
    raise InputError(f"recipe is {name!r}, which is unknown; {hint} (--list shows all)", parameter="recipe")
