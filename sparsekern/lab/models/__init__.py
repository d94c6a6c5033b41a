"""The networks of the recipes, one family a file: dense, plain :mod:`torch.nn`, at any width."""

from sparsekern.lab.models.gpt import GPT, gpt, gpt_small
from sparsekern.lab.models.layers import mlp
from sparsekern.lab.models.resnet import (
    ResNet,
    WideResNet,
    resnet18,
    resnet18_cifar,
    resnet20,
    resnet32_double,
    resnet34_cifar,
    resnet50,
    resnet56,
    wrn_22_2,
    wrn_28_4,
)
from sparsekern.lab.models.simple_vit import SimpleViT, simplevit_tiny
from sparsekern.lab.models.vgg import VGG, vgg16, vgg16_small

__all__ = [
    "GPT",
    "VGG",
    "ResNet",
    "SimpleViT",
    "WideResNet",
    "gpt",
    "gpt_small",
    "mlp",
    "resnet18",
    "resnet18_cifar",
    "resnet20",
    "resnet32_double",
    "resnet34_cifar",
    "resnet50",
    "resnet56",
    "simplevit_tiny",
    "vgg16",
    "vgg16_small",
    "wrn_22_2",
    "wrn_28_4",
]
