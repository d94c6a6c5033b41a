"""The table of layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparsekern as sk


def model() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return sk.sparsify_(net, 0.75, 16, targets="2", seed=0)


def test_the_table_by_hand():
    # sparse layer: 4 of 16 blocks of 256 elements of 4 bytes
    assert str(sk.summary(model())).splitlines()[3].split() == [
        "2", "SparseLinear", "64", "x", "64", "16x16", "4/16", "75.0%", "1,088", "0.01", "0.02",
        "0.00", "0.00", "0.00", "0.00", "0.01", "0.03",
    ]  # fmt: skip


def test_columns_line_up_and_the_total_adds_up():
    lines = str(sk.summary(model())).splitlines()
    assert len({len(lines[i]) for i in (0, 1, 3, 5)}) == 1
    parameters = [int(line.split("%")[1].split()[0].replace(",", "")) for line in lines[:-1] if "%" in line]
    assert parameters[-1] == sum(parameters[:-1]) == 16 * 64 + 64 + 1024 + 64 + 640 + 10


def test_the_sparsity_of_the_network_stands_beside_that_of_its_sparse_layers():
    """1024 of 4096 are stored; of all 16 * 64 + 4096 + 640 weights 2688."""
    net = model()
    assert str(sk.summary(net)).splitlines()[-1] == (
        "sparse layers: 75.0% absent; all weights of the network: 53.3% absent; 31.0% of the model's 6,026 parameters "
        "stay dense: 28.8% in nn.Linear, 2.1% in nn.BatchNorm1d"
    )
    net.append(nn.Embedding(10, 288))  # which no row of the table shows
    assert sk.summary(net).network_sparsity == pytest.approx(3072 / 8640)
    assert "absent" not in str(sk.summary(nn.Sequential(nn.Linear(4, 4))))


def test_with_a_batch_flops_are_counted_and_sparse_layers_timed():
    net = model()
    summary = sk.summary(net, torch.randn(12, 16))
    assert [row.tokens for row in summary.rows] == [12, 12, 12]
    assert list(summary.milliseconds) == ["2"]
    assert "dense ms" in str(summary)
    assert not sk.summary(net, torch.randn(12, 16), measure=False).milliseconds


def test_the_model_is_left_as_it_was():
    net = model().train()
    net[2].eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    sk.summary(net, torch.randn(12, 16))
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items()), "norm statistics too"
    assert net.training and net[1].training and not net[2].training
    assert all(p.grad is None for p in net.parameters())
    assert not any(m._forward_hooks for m in net.modules())


def test_a_layer_that_the_batch_does_not_reach():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    summary = sk.summary(Skips(), torch.ones(3, 4))
    assert [row.tokens for row in summary.rows] == [3, 0]


def test_the_optimizer_is_counted():
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.randn(12, 16)).sum().backward()
    optimizer.step()
    assert sk.summary(net, optimizer=optimizer).rows[1].state_bytes == 2 * 1024 * 4 + 4


def test_a_single_layer_and_a_model_without_layers():
    assert "(model)" in str(sk.summary(sk.SparseLinear(16, 16, block_size=4)))
    with pytest.raises(ValueError, match="no sparse layer, linear layer or convolution; there is nothing to summarise"):
        sk.summary(nn.ReLU())


def test_a_model_that_casts_or_names_its_input():
    class Casts(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = sk.SparseLinear(16, 16, block_size=4)

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.fc(input=x.bfloat16())

    assert list(sk.summary(Casts(), torch.ones(3, 16)).milliseconds) == ["fc"]


def test_convolutions_and_why_some_are_dense():
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 32, 3, stride=2, padding=1)
    )
    summary = sk.summary(sk.sparsify_(net, 0.75, 16, seed=0), torch.randn(2, 3, 8, 8))
    assert [row.tokens for row in summary.rows] == [2 * 8 * 8, 2 * 6 * 6, 2 * 3 * 3]
    assert list(summary.milliseconds) == ["2"]
    lines = str(summary).splitlines()
    assert "dense (stem)" in lines[2] and "dense (depthwise)" in lines[3]
    assert lines[4].split()[:12] == ["2", "SparseConv2d", "32", "x", "16", "x", "3", "x", "3", "16x16", "5/18", "72.2%"]


def test_the_flops_of_the_dense_network_stand_beside():
    x = torch.empty(3, 64)
    dense = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    made = sk.transforms.transform(dense, "factorized", 0.75, x, block_size=16, ignore=["0", "4"])
    summary = sk.summary(made, x, measure=False, dense=dense)
    rows = {row.name: row for row in summary.rows}
    assert list(rows) == ["0", "2.inner", "2.outer", "4"]
    assert summary.dense_flops == {"0": 18 * 64 * 128, "2.inner": 18 * 128 * 128, "4": 18 * 1280}
    assert rows["2.inner"].flops + rows["2.outer"].flops == summary.dense_flops["2.inner"]
    text = str(summary)
    assert text.splitlines()[0].count("dense MFLOP") == 1
    total = f"{18 * (8192 + 16384 + 1280) / 1e6:.2f}"
    assert text.splitlines()[-2].split()[3:5] == [total, total]
    assert sk.summary(model()).dense_flops["2"] == 6 * 64 * 64  # without one, those of the layer's own shape


def test_a_dense_network_of_another_kind():
    dense = nn.Sequential(
        nn.Linear(16, 64), nn.Identity(), nn.Identity(), nn.Identity(), nn.Identity(), nn.Linear(64, 1)
    )
    with pytest.raises(ValueError, match="dense has a layer '5' and the model has not: give the network it was made"):
        sk.summary(model(), torch.empty(2, 16), measure=False, dense=dense)
    with pytest.raises(ValueError, match="dense is given without a sample_input"):
        sk.summary(model(), dense=dense)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor, scale: float, *, mask: torch.Tensor | None = None) -> torch.Tensor:
        y = self.fc(x) * scale
        return self.head(y if mask is None else y[mask])


def test_any_arguments_of_the_model():
    net = sk.sparsify_(TwoInputs(), 0.5, 4, ignore="head")
    x, mask = torch.randn(5, 8), torch.tensor([True, False, True, False, False])
    positional = sk.summary(net, (x, 2.0))
    named = sk.summary(net, {"x": x, "scale": 2.0, "mask": mask}, measure=False)
    assert [row.tokens for row in positional.rows] == [5, 5] and list(positional.milliseconds) == ["fc"]
    assert [row.tokens for row in named.rows] == [5, 2]
    beside = sk.summary(net, (x, 2.0), measure=False, dense=sk.densify(net))
    assert beside.dense_flops == {"fc": 6 * 5 * 64, "head": 6 * 5 * 16}
    layers = sk.analysis.profile(net, {"x": x, "scale": 2.0}).layers
    assert {name: layer.multiply_adds for name, layer in layers.items()} == {"fc": 5 * 32, "head": 5 * 16}
