"""What goes along when blocks move, and what stays bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard
from torch.optim.swa_utils import AveragedModel

import sparsekern as sk
from sparsekern.topology import IndexSource
from sparsekern.training import Followers, Move
from tests.kernels.calls import ints
from tests.training.test_optimizer_state import OPTIMIZERS

SLOTS = torch.tensor([1, 3])


def model() -> nn.Sequential:
    return nn.Sequential(sk.SparseLinear(8, 12, block_size=(4, 2), blocks=5, capacity=6, seed=0, name="0"))


def absent(layer: sk.SparseLinear, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    present = set(zip(layer.row.tolist(), layer.col.tolist(), strict=True))
    cells = [(r, c) for r in range(layer.grid.rows) for c in range(layer.grid.cols) if (r, c) not in present]
    return ints(*(r for r, _ in cells[:count])), ints(*(c for _, c in cells[:count]))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        net(x).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("make", [make for make, _ in OPTIMIZERS.values()], ids=list(OPTIMIZERS))
def test_a_move_resets_the_moved_slots_and_nothing_else(make):
    net = model()
    optimizer = make(net.parameters())
    train(net, optimizer)
    followers = Followers({"0": net[0]}, optimizer, "zero")
    before = copy.deepcopy(optimizer.state[net[0].values])
    values, bias = net[0].values.detach().clone(), net[0].bias.detach().clone()
    bias_state = copy.deepcopy(optimizer.state[net[0].bias])
    followers.move({"0": Move(SLOTS, *absent(net[0], 2))})
    kept = [0, 2, 4, 5]
    assert (net[0].values[SLOTS] == 0).all() and torch.equal(net[0].values[kept], values[kept])
    for key, state in optimizer.state[net[0].values].items():
        if isinstance(state, torch.Tensor) and state.dim() > 0:
            fresh = 0.01 if key == "step_size" else 0.0
            assert (state[SLOTS] == fresh).all(), key
            assert torch.equal(state[kept], before[key][kept]), key
        else:
            assert state == before[key], "counters belong to the whole parameter"
    assert torch.equal(net[0].bias, bias)
    for key, state in optimizer.state[net[0].bias].items():
        assert state is None or torch.equal(torch.as_tensor(state), torch.as_tensor(bias_state[key]))


def test_mean_v_starts_the_second_moment_at_the_mean_of_the_others():
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    train(net, optimizer)
    state = optimizer.state[net[0].values]
    mean = state["exp_avg_sq"][[0, 2, 4]].mean()  # slot 5 is free
    Followers({"0": net[0]}, optimizer, "mean_v").move({"0": Move(SLOTS, *absent(net[0], 2))})
    torch.testing.assert_close(state["exp_avg_sq"][SLOTS], mean.expand(2, 4, 2))
    assert (state["exp_avg"][SLOTS] == 0).all()


def test_mean_v_of_adafactor():
    net = model()
    optimizer = torch.optim.Adafactor(net.parameters())
    train(net, optimizer)
    Followers({"0": net[0]}, optimizer, "mean_v").move({"0": Move(SLOTS, *absent(net[0], 2))})
    state = optimizer.state[net[0].values]
    assert (state["row_var"][SLOTS] > 0).all() and (state["col_var"][SLOTS] > 0).all()


def test_why_mean_v_exists():
    """A constant gradient: an old weight moves by the rate, one with fresh state by 3.2 times as much at once."""
    ratio = {}
    for grown_state in ("zero", "mean_v"):
        net = model()
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        followers = Followers({"0": net[0]}, optimizer, grown_state)
        for step in range(3001):
            net[0].values.grad = torch.ones_like(net[0].values)
            if step == 3000:
                followers.move({"0": Move(SLOTS, *absent(net[0], 2))})
                net[0].values.grad = torch.ones_like(net[0].values)
                before = net[0].values.detach().clone()
            optimizer.step()
        moved = (net[0].values - before).abs().detach()
        ratio[grown_state] = float(moved[1, 0, 0] / moved[0, 0, 0])
    # (1 - 0.9) / sqrt(1 - 0.999), and the bias correction of step 3001; with the mean, the first moment alone is young
    assert ratio["zero"] == pytest.approx(0.1 / 0.001**0.5 * (1 - 0.999**3001) ** 0.5, rel=0.01)
    assert ratio["mean_v"] == pytest.approx(0.1, rel=0.01)


def test_registered_tensors():
    net = model()
    optimizer = torch.optim.SGD(net.parameters())
    followers = Followers({"0": net[0]}, optimizer, "zero")
    zeroed, kept, custom = torch.ones(6, 4, 2), torch.ones(6), torch.ones(6, 2)
    followers.add_tensor("0", zeroed, "zero")
    followers.add_tensor("0", kept, "keep")
    followers.add_tensor("0", custom, lambda tensor, slots: tensor.index_fill_(0, slots, 7))
    moves = {"0": Move(SLOTS, *absent(net[0], 2))}
    followers.move(moves)
    assert (custom == 1).all(), "functions come last"
    followers.tell(moves)
    assert zeroed.sum(dim=(1, 2)).tolist() == [8, 0, 8, 0, 8, 8]
    assert kept.tolist() == [1] * 6
    assert custom[:, 0].tolist() == [1, 7, 1, 7, 1, 1]


@pytest.mark.parametrize("averaged", [False, True])
def test_a_moving_average_follows_across_a_move(averaged):
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    method = sk.SET(net, optimizer, update_every=1, drop_fraction=0.5)
    ema = AveragedModel(net, avg_fn=lambda e, p, n: 0.5 * e + 0.5 * p) if averaged else copy.deepcopy(net)
    method.follow(ema)
    twin = (ema.module if averaged else ema)[0]
    for _ in range(4):
        train(net, optimizer, 1)
        before = net[0].row.clone(), net[0].col.clone()
        values = twin.values.detach().clone()
        assert method.step()
        moved = (net[0].row != before[0]) | (net[0].col != before[1])
        assert moved.sum() == 2
        assert torch.equal(twin.row, net[0].row) and torch.equal(twin.col, net[0].col)
        assert (twin.values[moved] == 0).all() and torch.equal(twin.values[~moved], values[~moved])
        if averaged:
            ema.update_parameters(net)
        else:
            with torch.no_grad():
                twin.values.lerp_(net[0].values, 0.5)
        x = torch.randn(3, 8)
        expected = nn.functional.linear(x, twin.dense_weight(), twin.bias)
        torch.testing.assert_close(ema(x), expected)


def test_check_finds_an_optimizer_that_lost_the_layer():
    net = model()
    optimizer = torch.optim.SGD(net.parameters())
    followers = Followers({"0": net[0]}, optimizer, "zero")
    followers.check()
    optimizer.param_groups[0]["params"] = [net[0].bias]
    with pytest.raises(ValueError, match="values of '0' are not in this optimizer"):
        followers.check()
    net[0].values.requires_grad_(False)
    followers.check()


class TestErrors:
    def followers(self) -> tuple[nn.Sequential, Followers]:
        net = model()
        return net, Followers({"0": net[0]}, torch.optim.SGD(net.parameters()), "zero")

    def test_copies(self):
        net, followers = self.followers()
        with pytest.raises(ValueError, match=r"AveragedModel\(use_buffers=True\) averages the coordinates"):
            followers.add_model(AveragedModel(net, use_buffers=True))
        other = copy.deepcopy(net)
        other[0].move_(SLOTS, ints(-1, -1), ints(-1, -1))
        with pytest.raises(ValueError, match="'0' has other blocks in the copy"):
            followers.add_model(other)

    def test_a_place_that_is_taken(self):
        net, followers = self.followers()
        with pytest.raises(ValueError, match="both at block"):
            followers.check_moves({"0": Move(SLOTS, net[0].row[[0, 2]], net[0].col[[0, 2]])})

    def test_a_copy_that_went_another_way(self):
        net, followers = self.followers()
        ema = copy.deepcopy(net)
        followers.add_model(ema)
        move = Move(SLOTS, *absent(net[0], 2))
        followers.check_moves({"0": move})
        ema[0].move_(*move)
        with pytest.raises(ValueError, match="'0' has other blocks in a copy that follows the model"):
            followers.check_moves({"0": move})


class TestAllOrNothing:
    """Whatever forbids a write is found before the first layer moves."""

    def nets(self):
        net = nn.Sequential(
            *(sk.SparseLinear(8, 8, block_size=(4, 2), blocks=5, seed=0, name=str(i)) for i in range(2))
        )
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        train(net, optimizer)
        return net, optimizer, sk.SET(net, optimizer, update_every=1, drop_fraction=0.5)

    def refused(self, net, method, match, kind=ValueError):
        before, updates = copy.deepcopy(net.state_dict()), method.updates
        with pytest.raises(kind, match=match):
            method.update()
        assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
        assert method.updates == updates

    def test_trying_is_no_write_into_the_places(self, monkeypatch):
        """Else every update builds a second index to compare: at 1x1 several times the memory of the values."""
        net, _, method = self.nets()
        twin = copy.deepcopy(net)
        method.follow(twin)
        twin(torch.ones(1, 8))  # a copy compares its index once
        monkeypatch.setattr(IndexSource, "renew", lambda source: pytest.fail("an index was compared"))
        row, col = net[0].row.clone(), net[0].col.clone()
        method.update()
        assert not (torch.equal(net[0].row, row) and torch.equal(net[0].col, col))
        assert torch.equal(twin[0].row, net[0].row) and torch.equal(twin[0].col, net[0].col)

    def test_a_copy_whose_index_is_of_other_places(self):
        net, _, method = self.nets()
        twin = copy.deepcopy(net)
        method.follow(twin)
        twin[1].move_(torch.arange(5), *(torch.full((5,), -1, dtype=torch.int32) for _ in range(2)))
        twin[1].row.copy_(net[1].row)
        twin[1].col.copy_(net[1].col)
        self.refused(net, method, "other code overwrote row and col of layer '1'")

    def test_a_follower_that_cannot_be_written(self):
        net, _, method = self.nets()
        with torch.inference_mode():
            frozen = torch.ones(5)
        method.follow(frozen, layer="1")
        self.refused(
            net, method, "a follower of '1' cannot be written in place where blocks move: Inplace update to inf"
        )

    def test_a_follower_that_lost_its_slots(self):
        net, _, method = self.nets()
        tensor = torch.ones(5)
        method.follow(tensor, layer="1")
        tensor.resize_(3)
        self.refused(net, method, r"a follower of '1' has shape \(3,\); it had 5 slots before")

    def test_a_state_that_cannot_be_written(self):
        net, optimizer, method = self.nets()
        with torch.inference_mode():
            state = torch.zeros_like(net[1].values)
        optimizer.state[net[1].values]["momentum_buffer"] = state
        self.refused(net, method, "the optimizer's 'momentum_buffer' of '1' cannot be written in place")

    def test_a_copy_of_sharded_values(self):
        net, _, method = self.nets()
        ema = copy.deepcopy(net)
        method.follow(ema)
        ema[1].values.device_mesh, ema[1].values.placements = None, (Shard(1),)
        self.refused(net, method, r"values of '1' are sharded as S\(1\), and blocks move only", NotImplementedError)

    def test_a_copy_of_other_blocks_at_the_same_places(self):
        net, _, method = self.nets()
        other = nn.Sequential(
            *(sk.SparseLinear(16, 8, block_size=4, topology=None, blocks=5, seed=0, name=str(i)) for i in range(2))
        )
        for twin, layer in zip(other, net, strict=True):
            twin.row.copy_(layer.row)
            twin.col.copy_(layer.col)
        with pytest.raises(ValueError, match="'0' has other blocks in the copy"):
            method.follow(other)

    def test_functions_are_called_last_and_all_of_them(self):
        _, _, method = self.nets()
        seen, places = [], {}

        def fails(tensor, slots):
            seen.append("fails")
            raise KeyError("mine")

        def notes(tensor, slots):
            seen.append("notes")
            places.update({name: layer.topology.keys() for name, layer in method.layers.items()})

        method.follow(torch.ones(5), layer="0", on_move=fails)
        method.follow(torch.ones(5), layer="1", on_move=notes)
        before = {name: layer.topology.keys() for name, layer in method.layers.items()}
        with pytest.raises(KeyError, match="mine"):
            method.update()
        assert seen == ["fails", "notes"] and method.updates == 1
        for name, layer in method.layers.items():
            now = layer.topology.keys()
            assert torch.equal(places[name], now) and not torch.equal(before[name], now)
            layer.topology.validate()
