"""The networks of the recipes, one family a file: dense, plain :mod:`torch.nn`, at any width."""

from sparsekern.recipes.models.cifar_resnet import CifarResNet, resnet20, resnet56
from sparsekern.recipes.models.gpt import GPT, gpt_small
from sparsekern.recipes.models.mlp import mlp
from sparsekern.recipes.models.resnet import ResNet, resnet18, resnet18_cifar, resnet50
from sparsekern.recipes.models.simple_vit import SimpleViT, simplevit_tiny
from sparsekern.recipes.models.vgg import VGG, vgg16, vgg16_small
from sparsekern.recipes.models.wide_resnet import WideResNet, wrn_28_4

__all__ = [
    "GPT",
    "VGG",
    "CifarResNet",
    "ResNet",
    "SimpleViT",
    "WideResNet",
    "gpt_small",
    "mlp",
    "resnet18",
    "resnet18_cifar",
    "resnet20",
    "resnet50",
    "resnet56",
    "simplevit_tiny",
    "vgg16",
    "vgg16_small",
    "wrn_28_4",
]
