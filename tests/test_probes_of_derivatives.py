"""Probes of losses that contain derivatives of the layer: what they hear is the gradient of a dense twin's weight."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from sparsekern.kernels.contract import ConvShape
from torch import Tensor
from torch.nn.functional import linear

from sparsekern import ops
from sparsekern.ops import Probe
from sparsekern.topology import Grid, Topology, balanced, build_index, conv_grid, gather_blocks, generator_for, to_dense
from tests.oracle_conv2d import dense_conv2d

F64 = torch.float64
BLOCK = (4, 2)
SHAPES = {
    "linear": None,
    "conv": ConvShape(4, 6, (3, 2), stride=(1, 2), padding=(1, 0, 2, 1)),
    "groups": ConvShape(6, 8, (2, 3), padding=(1, 1, 1, 1), groups=2),
    "pointwise": ConvShape(6, 4, (1, 1)),
}
Layer = Callable[[Tensor], Tensor]


def derivative(layer: Layer, x: Tensor) -> Tensor:
    """Return the derivative of a loss by x, itself differentiable."""
    (found,) = torch.autograd.grad(layer(x).sin().sum(), x, create_graph=True)
    return found


LOSSES: dict[str, Callable[[Layer, Tensor], Tensor]] = {
    "a gradient penalty": lambda layer, x: derivative(layer, x).square().sum(),
    "and the output": lambda layer, x: derivative(layer, x).square().sum() + layer(x).square().sum(),
    "a second derivative": lambda layer, x: derivative(lambda z: derivative(layer, z), x).square().sum(),
    "two calls": lambda layer, x: layer(x).square().sum() + layer(x.flip(0) * 0.5).sin().sum(),
}


def case(name: str) -> tuple[Grid, Tensor, Topology, Tensor]:
    shape, generator = SHAPES[name], torch.Generator().manual_seed(3)
    if shape is None:
        grid, size = Grid(11, 9, BLOCK), (5, 9)
    else:
        grid = conv_grid(shape.in_channels, shape.out_channels, shape.kernel, BLOCK, shape.groups)
        size = (2, shape.in_channels, 5, 6)
    topology = balanced(grid, max(2, grid.cells // 3), generator_for(0))
    values = torch.randn(topology.slots, *BLOCK, dtype=F64, generator=generator)
    real = topology.real()
    if real is not None:
        values.masked_fill_(~real, 0)
    return grid, torch.randn(size, dtype=F64, generator=generator).requires_grad_(), topology, values.requires_grad_()


def sparse_gradients(name: str, loss: str, probe: Probe | None) -> Tensor:
    """Return the gradient of the stored blocks; the probe hears its own."""
    grid, x, topology, values = case(name)
    index, shape = build_index(topology), SHAPES[name]

    def layer(z: Tensor) -> Tensor:
        if shape is None:
            return ops.linear(z, values, None, index, grid, probe)
        return ops.conv2d(z, values, None, index, grid, shape, probe)

    LOSSES[loss](layer, x).backward()
    assert values.grad is not None
    return values.grad


def dense_gradient(name: str, loss: str) -> Tensor:
    """Return the gradient of the whole weight of a dense layer with the same numbers."""
    _, x, topology, values = case(name)
    weight, shape = to_dense(topology, values.detach()).requires_grad_(), SHAPES[name]

    def layer(z: Tensor) -> Tensor:
        return linear(z, weight) if shape is None else dense_conv2d(z, weight, None, shape)

    LOSSES[loss](layer, x).backward()
    assert weight.grad is not None
    return weight.grad


def everywhere(grid: Grid) -> Topology:
    keys = torch.arange(grid.cells, dtype=torch.int32)
    return Topology(grid, keys // grid.cols, keys % grid.cols)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", SHAPES)
def test_candidates_hear_the_gradient_of_the_whole_weight(name, loss):
    grid, _, topology, _ = case(name)
    whole, cells = dense_gradient(name, loss), everywhere(grid)
    probe = Probe.candidates(grid, cells.row, cells.col, dtype=F64)
    stored = sparse_gradients(name, loss, probe)
    torch.testing.assert_close(stored, gather_blocks(topology, whole))
    torch.testing.assert_close(probe.tensor.grad, gather_blocks(cells, whole))
    assert torch.equal(stored, sparse_gradients(name, loss, None)), "a probe changes nothing"


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", SHAPES)
def test_sketches_are_of_the_gradient_of_the_whole_weight(name, loss):
    grid = case(name)[0]
    make = torch.Generator().manual_seed(5)
    u, v = (torch.randn(3, n, dtype=F64, generator=make) for n in (grid.out_features, grid.in_features))
    probe, cells = Probe.sketch(grid, u, v), everywhere(grid)
    sparse_gradients(name, loss, probe)
    outer = [to_outer(grid, u[q], v[q]) for q in range(3)]
    weighted = [gather_blocks(cells, dense_gradient(name, loss) * o).sum((1, 2)) for o in outer]
    torch.testing.assert_close(probe.tensor.grad, torch.stack(weighted).view(3, grid.rows, grid.cols))


def to_outer(grid: Grid, u: Tensor, v: Tensor) -> Tensor:
    """Return ``u v'`` in the shape of the dense weight; columns are in (tap, channel) order."""
    if grid.kernel is None:
        return torch.outer(u, v)
    return torch.outer(u, v).view(-1, *grid.kernel, grid.tap_in).permute(0, 3, 1, 2)


@pytest.mark.parametrize("kind", ["magnitudes", "signed_sums"])
@pytest.mark.parametrize("name", SHAPES)
def test_marginals_see_what_reaches_the_weight_through_dx(name, kind):
    """A loss of dx alone: dy' g, where dy is of ones. As those of a batch whose input is g."""
    grid, x, topology, values = case(name)
    shape, index = SHAPES[name], build_index(topology)

    def make() -> Probe:
        if kind == "magnitudes":
            return Probe.magnitudes(grid, dtype=F64)
        return Probe.signed_sums(grid, torch.tensor(7), dtype=F64)

    def layer(z: Tensor, probe: Probe) -> Tensor:
        if shape is None:
            return ops.linear(z, values, None, index, grid, probe)
        return ops.conv2d(z, values, None, index, grid, shape, probe)

    through_dx, plain = make(), make()
    (dx,) = torch.autograd.grad(layer(x, through_dx).sum(), x, create_graph=True)
    assert through_dx.tensor.grad is None
    g = torch.randn(x.shape, dtype=F64, generator=torch.Generator().manual_seed(8))
    (dx * g).sum().backward()
    layer(g, plain).sum().backward()
    torch.testing.assert_close(through_dx.tensor.grad, plain.tensor.grad)
    assert plain.tensor.grad.any()
