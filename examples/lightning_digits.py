"""A sparse network in the Trainer of Lightning, which saves the method's state in its checkpoints.

python examples/lightning_digits.py --epochs 10
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from digits import digits
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import sparsekern as sk
from sparsekern.integrations.lightning import SparseCallback


class Classifier(LightningModule):
    """A perceptron whose hidden layers are sparse."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
        )
        sk.sparsify_(self.net, sparsity=0.9, block_size=16, ignore=["0", "4"])
        self.correct = 0.0

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images.flatten(1)), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], number: int) -> None:
        images, labels = batch
        self.correct = (self.net(images.flatten(1)).argmax(1) == labels).float().mean().item()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(epochs: int = 10, width: int = 512) -> float:
    """Train and print; return the accuracy on the test images."""
    torch.manual_seed(0)
    train, test = digits()
    model = Classifier(width)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=epochs,
            default_root_dir=folder,
            accelerator="auto",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[callback := SparseCallback("set", update_every=10)],
        )
        trainer.fit(
            model,
            DataLoader(TensorDataset(*train), batch_size=64, shuffle=True),
            DataLoader(TensorDataset(*test), batch_size=len(test[0])),
        )
    numbers = callback.method.metrics()
    print(f"{model.correct:.2%} correct, {numbers['updates']} updates, {numbers['sparsity/global']:.1%} absent")
    return model.correct


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    main(**vars(parser.parse_args()))
