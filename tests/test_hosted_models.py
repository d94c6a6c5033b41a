"""Sparse layers inside the real Transformers and Lightning: models that are built by those and filled from files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import sparsekern as sk

X = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))


def net(block: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 8))


@pytest.mark.parametrize("block", [1, 16])
def test_from_pretrained_twenty_times(tmp_path: Path, block: int):
    """Buffers that no file holds are made of memory that was never set."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()

    class Config(transformers.PretrainedConfig):
        model_type = "sparse-classifier"

    class Classifier(transformers.PreTrainedModel):
        config_class = Config

        def __init__(self, config):
            super().__init__(config)
            self.net = sk.sparsify_(net(block), sparsity=0.5, block_size=block)
            self.post_init()

        def forward(self, x):
            return self.net(x)

    model = Classifier(Config())
    assert sk.SET(model, torch.optim.SGD(model.parameters())).update()  # the seed no longer tells the places
    model.save_pretrained(tmp_path)
    expected = model(X)
    for _ in range(20):
        assert torch.equal(Classifier.from_pretrained(tmp_path)(X), expected)
    low = Classifier.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert low.net[0].row.dtype == torch.int32
    assert torch.equal(low(X.bfloat16()), model.to(torch.bfloat16)(X.bfloat16()))


def test_lightning_averages_parameters_and_never_computes_with_averaged_places(tmp_path: Path):
    pytest.importorskip("lightning")
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import EMAWeightAveraging

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = sk.sparsify_(net(16), sparsity=0.3, block_size=4, seed=0)

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, number):
            return self.net(batch[0]).square().mean()

        validation_step = training_step

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X.repeat(3, 1)), batch_size=4)

    def fit(**options) -> None:
        trainer = Trainer(
            default_root_dir=tmp_path,
            max_epochs=2,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[EMAWeightAveraging(decay=0.9992, update_every_n_steps=1, **options)],
        )
        trainer.fit(Module(), data, data)

    with pytest.raises(ValueError, match=r"other code overwrote row and col.*average parameters only"):
        fit()
    fit(use_buffers=False)
