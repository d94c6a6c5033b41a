"""The correction of one optimizer step: the snapshot's gradients, subtracted before the pass they belong to (AGENT)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparsekern.errors import InputError
from sparsekern.training.agent.extra import ExtraCost
from sparsekern.training.agent.snapshot import Snapshot
from sparsekern.training.agent.variance import VarianceRatio
from sparsekern.training.agent.weighting import Products, inner
from sparsekern.training.closures import backpropagate, loss_of
from sparsekern.training.distributed import ranks, sum_over_ranks
from sparsekern.training.passes import extra_passes, parallel_modules, scale_of, without_gradients


class Noted(NamedTuple):
    """What a step is to learn from, not scaled: inner products of each group, and samples of gradients."""

    products: Tensor
    corrected: Tensor
    plain: Tensor
    scale: Tensor


class Correction:
    """What becomes of the batches between two optimizer steps.

    Args:
        model: see :class:`~sparsekern.training.AGENT`.
        snapshot: of it.
        groups: the group of each parameter, by name.
        learns: whether the weights of the groups are found from gradients: the residuals stay until the step.
        cost: takes the FLOPs of passes.
        process_group: of the ranks.

    Attributes:
        weights: of the residual, ``gamma c``, by group.
        averaged: steps in the snapshot's mean, where it is taken during the steps; None where it was known before.
        products: sums over steps, for the next weights.
        variance: of the corrected gradient against the plain one.
    """

    def __init__(
        self,
        model: nn.Module,
        snapshot: Snapshot,
        groups: dict[str, str],
        *,
        learns: bool,
        cost: ExtraCost,
        process_group: dist.ProcessGroup | None,
    ) -> None:
        self._model, self._snapshot, self._learns, self._cost = model, snapshot, learns, cost
        self._process_group = process_group
        self._group = groups
        self.weights = dict.fromkeys(groups.values(), 0.0)
        self.averaged: int | None = None
        device = next(iter(snapshot.parameters.values())).device
        self.products = Products(len(self.weights), device)
        self.variance = VarianceRatio({name: p.numel() for name, p in snapshot.parameters.items()}, device)
        self.begin_step()

    def begin_step(self) -> None:
        """Forget the batches since the last optimizer step."""
        self._residual: dict[str, Tensor] = {}  # the snapshot's gradient less its mean, where c comes from it
        self._taken_off: Tensor | None = None  # a sample of what was subtracted
        self._noted: Noted | None = None
        self._left: tuple[Tensor, int] | None = None  # a gradient as the last backward left it, with its version

    def _is_first(self) -> bool:
        """Return whether gradients begin anew with this backward, or add up to those of one before."""
        if self._left is None:
            return True
        gradients = [p.grad for p in self._snapshot.parameters.values() if p.grad is not None]
        tensor, version = self._left
        if any(g is tensor for g in gradients) and tensor._version == version:
            return False
        return not any(bool(g.any()) for g in gradients)  # scaling skipped the step, and the gradients were zeroed

    def _snapshot_backward(
        self, closure: Callable[[], Tensor], scaler: torch.amp.GradScaler | None, first: bool
    ) -> dict[str, Tensor]:
        """Return the gradients of a batch at the snapshot, scaled, by parameter; the first time less their mean."""
        snapshot = self._snapshot
        with extra_passes(self._model), snapshot.swapped(), without_gradients(self._model):
            with self._cost.counted("snapshot"):
                backpropagate(loss_of(closure), scaler)
            found = {name: p.grad for name, p in snapshot.parameters.items()}
        residual = {}
        for name, gradient in found.items():
            mean = snapshot.mean[name]
            if gradient is None:  # took no part in this batch
                if not bool(mean.any()):
                    continue
                gradient = torch.zeros_like(snapshot.values[name])
            elif gradient.is_sparse:
                raise InputError(f"{name} has a sparse gradient, which AGENT does not correct; use sparse=False")
            if first:
                gradient.sub_(mean if scaler is None else mean * scale_of(scaler, mean.device))
            residual[name] = snapshot.zero_moved_(name, gradient)
        return residual

    def subtract(self, closure: Callable[[], Tensor], scaler: torch.amp.GradScaler | None) -> None:
        """Run a batch at the snapshot, and put what is to be subtracted from its gradients into ``.grad``."""
        first = self._is_first()
        if first:
            self.begin_step()
        self._correct(self._snapshot_backward(closure, scaler, first))

    def _weight(self, name: str) -> float:
        return 0.0 if self.averaged == 0 else self.weights[self._group[name]]  # at first there is no mean yet

    @torch.no_grad()
    def _correct(self, residual: dict[str, Tensor]) -> None:
        """Add the correction to the gradients before the pass: DDP then averages it over ranks with the rest.

        Empties ``residual``, so that no more is held than one copy of the values.
        """
        taken_off = []
        for name, parameter in self._snapshot.parameters.items():
            r, weight = residual.pop(name, None), self._weight(name)
            sample = self.variance.sample(name, r if weight else None)
            taken_off.append(sample.mul_(weight))
            if r is None:
                continue
            if weight and parameter.grad is None:
                parameter.grad = r * -weight if self._learns else r.mul_(-weight)  # the same memory, where it may be
            elif weight and parameter.grad is not None:
                parameter.grad.sub_(r, alpha=weight)
            if self._learns:
                whole = self._residual.get(name)
                self._residual[name] = r if whole is None else whole.add_(r)
        sample = torch.cat(taken_off)
        self._taken_off = sample if self._taken_off is None else self._taken_off.add_(sample)

    @torch.no_grad()
    def note(self, scaler: torch.amp.GradScaler | None) -> None:
        """Note what the step is to learn from, as far as its batches have come."""
        gradients = {name: p.grad for name, p in self._snapshot.parameters.items()}
        self._left = next(((g, g._version) for g in gradients.values() if g is not None), None)
        parallel = parallel_modules(self._model)
        if not all(module.require_backward_grad_sync for module in parallel):
            return  # these are this rank's alone so far
        assert self._taken_off is not None
        if parallel:
            sum_over_ranks(self._taken_off, self._process_group).div_(ranks(self._process_group))
            if self._learns:
                self._average_residual()
        scale = scale_of(scaler, self._taken_off.device)
        corrected = torch.cat([self.variance.sample(name, g) for name, g in gradients.items()])
        products = torch.zeros_like(self.products.sums)
        groups = list(self.weights)
        for name, r in self._residual.items():
            square, gradient = inner(r, r), gradients[name]
            product = self._weight(name) * square + (0 if gradient is None else inner(gradient, r))
            products[groups.index(self._group[name])] += torch.stack([product, square]).to(products.device)
        plain = corrected + self._taken_off
        self._noted = Noted(products / scale.double() ** 2, corrected / scale, plain / scale, scale)

    def _average_residual(self) -> None:
        """Average the residuals over ranks; a parameter may have taken part in the batches of some of them only."""
        for name, values in self._snapshot.values.items():
            r = self._residual.get(name)
            r = self._residual[name] = torch.zeros_like(values) if r is None else r
            sum_over_ranks(r, self._process_group).div_(ranks(self._process_group))

    @torch.no_grad()
    def commit(self) -> None:
        """Learn from a step that the optimizer has made."""
        noted = self._noted
        if noted is None:
            return
        self.variance.add(noted.corrected, noted.plain)
        if self.averaged != 0:
            self.products.add(noted.products)
        if self.averaged is not None:
            self.averaged += 1
            for name, r in self._residual.items():
                mean = self._snapshot.mean[name]
                mean.add_(r / (noted.scale.to(mean) * self.averaged))
