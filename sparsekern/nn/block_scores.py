"""Scores of the blocks of dense layers before a training, and the topologies of the best ones.

A block's score is what the publications give a weight, for a gate on the whole block: the sum over its weights of
``weight * gradient``. With 1x1 blocks it is the published score.

* SNIP: Lee, Ajanthan and Torr, "SNIP: Single-shot network pruning based on connection sensitivity", ICLR 2019.
* GraSP: Wang, Zhang and Grosse, "Picking winning tickets before training by preserving gradient flow", ICLR 2020.
* SynFlow: Tanaka et al., "Pruning neural networks without any data by iteratively conserving synaptic flow", NeurIPS
  2020.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsekern.errors import InputError
from sparsekern.kernels.contract import is_finite
from sparsekern.nn.surgery import restored
from sparsekern.topology import (
    Grid,
    Topology,
    by_score,
    dense_block_norms,
    dense_block_sums,
    generator_for,
    zero_blocks_,
)
from sparsekern.topology.arguments import check_choice

SCORES = ("magnitude", "random", "snip", "grasp", "synflow")

ITERATIONS = 100
"""Rounds of SynFlow, as in its paper."""


Share = tuple[list[str], int]
"""Names of layers, and the number of blocks that they have together."""


def check_score(score: str | None, sample: Any, init: str, distribution: str) -> None:
    """Raise ValueError if a score is unknown or contradicts another argument of :func:`sparsekern.sparsify_`."""
    if score is None:
        if sample is not None:
            raise InputError("sample is given without a score that reads it; give a score", parameter="sample")
        if distribution == "global":
            raise InputError(
                "distribution is 'global', which ranks trained weights; give a score, or init='norm'",
                parameter="distribution",
            )
        return
    check_choice("score", score, SCORES)
    if init == "random":
        raise InputError(
            f"init is 'random', but score={score!r} keeps the trained values; leave one of them out", parameter="init"
        )


class Scoring:
    """Scores the blocks of some dense layers of a model; nothing of the model changes.

    Gradients come one weight at a time: each is reduced to a number a block, and freed, before the backward computes
    the next. GraSP holds one gradient of all layers, from which it differentiates, SynFlow one copy of the weights.

    Args:
        model: the dense model.
        grids: of the layers, by name.
        score: one of :data:`SCORES`.
        sample: what the loss is computed from; see :func:`sparsekern.sparsify_`.
        tie_taps: score a block of channels in all taps of a convolution as one.
        seed: of random scores, together with the layer's name.

    Raises:
        ValueError: a weight is on the meta device, or the sample does not suit the score.
    """

    def __init__(
        self, model: nn.Module, grids: Mapping[str, Grid], score: str, sample: Any, tie_taps: bool, seed: int
    ) -> None:
        self.model, self.grids, self.score, self.tie_taps, self.seed = model, grids, score, tie_taps, seed
        self.weights = {name: cast(nn.Parameter, model.get_submodule(name).weight) for name in grids}
        for name, weight in self.weights.items():
            if weight.is_meta:
                raise InputError(
                    f"score is {score!r}, and {name!r} has no weight on the meta device; load the model first",
                    parameter="score",
                )
        self.loss = _loss(model, score, sample)

    def places(self, shares: list[Share]) -> dict[str, Topology]:
        """Return the topologies of the blocks of highest score, in each share the number of blocks that it gives.

        The best block of each layer is always among them.

        Raises:
            ValueError: scores are NaN or infinite.
        """
        if self.score == "synflow":
            kept = self._synaptic_flow(shares)
        elif self.score in ("snip", "grasp"):
            kept = self._best(self._of_gradients(), shares)
        else:
            kept = self._best({name: self._of_weight(name) for name in self.grids}, shares)
        return {
            name: by_score(self.grids[name], mask.float(), int(mask.sum()) * self._cost(name), self._tied(name))
            for name, mask in kept.items()
        }

    def _tied(self, name: str) -> bool:
        return self.tie_taps and self.grids[name].kernel is not None

    def _cost(self, name: str) -> int:
        """Return the blocks that one score stands for."""
        return self.grids[name].taps if self._tied(name) else 1

    def _of_weight(self, name: str) -> Tensor:
        grid = self.grids[name]
        if self.score == "random":
            cells = grid.rows, grid.cols // self._cost(name)
            return torch.rand(cells, generator=generator_for(self.seed, name, "score"), device="cpu")
        norms = dense_block_norms(grid, self.weights[name].detach())
        if self._tied(name):
            norms = norms.unflatten(1, (grid.taps, grid.tap_cols)).norm(dim=1)
        scores: Tensor = norms / math.sqrt(math.prod(grid.block) * self._cost(name))
        return scores

    def _sums(self, name: str, product: Tensor) -> Tensor:
        """Return the sums ``(R, C)`` over blocks, or over blocks in all taps, of a tensor like the weight."""
        sums: Tensor = dense_block_sums(self.grids[name], product).unflatten(1, (self._cost(name), -1)).sum(1)
        return sums

    def _of_gradients(self) -> dict[str, Tensor]:
        twice = sdpa_kernel(SDPBackend.MATH) if self.score == "grasp" else nullcontext()  # others differentiate once
        with _only_trained(self.model, self.weights.values()), twice:
            loss = self._checked_loss()
            if self.score == "grasp":
                first = torch.autograd.grad(loss, list(self.weights.values()), create_graph=True, allow_unused=True)
                used = [gradient for gradient in first if gradient is not None]
                loss = sum(((g * g.detach()).sum() for g in used), torch.zeros((), device=loss.device))
                del first, used
            sums = self._reduced(loss)
        self._check_some(sums)
        return {name: s.abs() for name, s in sums.items()} if self.score == "snip" else sums

    def _checked_loss(self) -> Tensor:
        """Return the loss, or for SynFlow the output, a tensor of one number with a graph."""
        loss = self.loss()
        if not isinstance(loss, Tensor) or loss.dim() or not loss.requires_grad:
            what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"type {type(loss).__name__}"
            raise InputError(
                f"the sample gives a loss of {what}; it must be a tensor of one number that requires grad",
                parameter="sample",
            )
        return loss

    def _reduced(self, loss: Tensor) -> dict[str, Tensor]:
        """Return the sums over blocks of ``weight * gradient``; each gradient is freed as soon as it is there."""
        sums = {}
        hooks = []
        for name, weight in self.weights.items():

            def reduce(parameter: Tensor, name: str = name) -> None:
                assert parameter.grad is not None
                sums[name] = self._sums(name, parameter.detach() * parameter.grad)
                parameter.grad = None

            hooks.append(weight.register_post_accumulate_grad_hook(reduce))
        try:
            loss.backward()
        finally:
            for hook in hooks:
                hook.remove()
        for name in self.grids.keys() - sums.keys():
            raise InputError(
                f"{name!r} has no gradient: the sample does not use it; ignore it, or give another sample",
                parameter="sample",
            )
        return sums

    def _check_some(self, scores: Mapping[str, Tensor]) -> None:
        """Raise ValueError if all scores are 0, so that blocks have no order."""
        if not any(bool(part.any()) for part in scores.values()):
            raise InputError(
                f"all scores by {self.score} are 0, as no gradient passes a layer of zeros, such as a head that starts "
                "at zero; give another score, or train the model before",
                parameter="score",
            )

    def _synaptic_flow(self, shares: list[Share]) -> dict[str, Tensor]:
        """Return the blocks kept after :data:`ITERATIONS` rounds, in which their number falls geometrically."""
        kept = {
            name: torch.ones(
                grid.rows, grid.cols // self._cost(name), dtype=torch.bool, device=self.weights[name].device
            )
            for name, grid in self.grids.items()
        }
        with _only_trained(self.model, self.weights.values()), _absolute(self.model):
            for round_ in range(1, ITERATIONS + 1):
                scores = self._reduced(self._checked_loss())
                if round_ == 1:  # later on a layer may be cut off
                    self._check_some(scores)
                falling = []
                for names, blocks in shares:
                    cells = sum(self.grids[name].cells for name in names)
                    falling.append((names, round(cells * (blocks / cells) ** (round_ / ITERATIONS))))
                gone = {name: score.masked_fill(~kept[name], -1) for name, score in scores.items()}
                kept = self._best(gone, falling)
                for name, mask in kept.items():
                    whole = mask.repeat(1, self._cost(name))
                    zero_blocks_(self.grids[name], self.weights[name], whole)
        return kept

    def _best(self, scores: Mapping[str, Tensor], shares: list[Share]) -> dict[str, Tensor]:
        """Return masks ``(R, C)``, by layer, of the blocks that are among the best of their share."""
        kept = {}
        for names, blocks in shares:
            parts = [scores[name].flatten() for name in names]
            for name, part in zip(names, parts, strict=True):
                if not is_finite(part):
                    raise InputError(
                        f"scores of {name!r} by {self.score} are NaN or infinite; compute them in float64 "
                        "(model.double()), or from another sample",
                        parameter="score",
                    )
            lifted = [part.index_fill(0, part.argmax(), torch.inf).cpu() for part in parts]  # no layer is emptied
            cost = torch.cat([torch.full(p.shape, self._cost(n)) for n, p in zip(names, parts, strict=True)])
            order = torch.cat(lifted).sort(descending=True, stable=True).indices
            chosen = torch.zeros(order.shape[0], dtype=torch.bool)
            chosen[order] = 2 * cost[order].cumsum(0) - cost[order] <= 2 * blocks
            for name, part, mask in zip(names, parts, chosen.split([p.shape[0] for p in parts]), strict=True):
                mine = mask.to(part.device)
                mine[part.argmax()] = True
                kept[name] = mine.view_as(scores[name])
        return kept


def _loss(model: nn.Module, score: str, sample: Any) -> Callable[[], Tensor]:
    """Return the function whose gradient scores; one that is never called where a score needs none."""
    if score in ("magnitude", "random"):
        if sample is not None:
            raise InputError(f"sample has no effect on the score {score!r}; leave it out", parameter="sample")
        return lambda: torch.zeros(())
    if callable(sample):
        return cast("Callable[[], Tensor]", sample)
    if score == "synflow" and isinstance(sample, Tensor) and sample.is_floating_point() and sample.dim():
        return lambda: model(torch.ones_like(sample[:1])).sum()
    if score != "synflow" and isinstance(sample, (tuple, list)) and len(sample) == 2:
        return lambda: nn.functional.cross_entropy(model(sample[0]), sample[1])
    rule = (
        "an input of the model, of real numbers, whose first example says the shape"
        if score == "synflow"
        else "a batch (inputs, classes)"
    )
    raise InputError(
        f"sample is {'missing' if sample is None else f'a {type(sample).__name__}'}; for the score {score!r} it must "
        f"be {rule}, or a function without arguments that returns the loss, such as lambda: loss_fn(model(x), y)",
        parameter="sample",
    )


@contextmanager
def _only_trained(model: nn.Module, weights: Any) -> Iterator[None]:
    """Take gradients of some weights alone; at the end gradients, flags and buffers are what they were."""
    chosen = {id(weight) for weight in weights}
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        for parameter, _, _ in flags:
            parameter.grad = None
            parameter.requires_grad_(id(parameter) in chosen)
        with restored(model.buffers()):
            yield
    finally:
        for parameter, flag, gradient in flags:
            parameter.requires_grad_(flag)
            parameter.grad = gradient


@contextmanager
def _absolute(model: nn.Module) -> Iterator[None]:
    """Make all parameters and buffers their absolute values, in evaluation mode; at the end all is what it was."""
    modes = [(module, module.training) for module in model.modules()]
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    try:
        model.eval()
        with restored(tensors):
            with torch.no_grad():
                for tensor in tensors:
                    tensor.abs_()
            yield
    finally:
        for module, mode in modes:
            module.training = mode
