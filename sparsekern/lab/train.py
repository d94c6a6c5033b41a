"""Training of one network: model, optimizer, method, and the place in the training."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from sparsekern.analysis import network_sparsity, spectral, stored_parameters, training_bytes
from sparsekern.errors import InputError
from sparsekern.lab.distributed import Share, gathered, unsynchronised
from sparsekern.lab.resolved import Run, build, build_agent, build_method
from sparsekern.lab.tasks import Batch
from sparsekern.nn import sparse_layers
from sparsekern.nn.sharded import sharded_as
from sparsekern.training import Gradual, Lottery, NetworkSampler, compact_

WARM_UP = 5
"""Steps at the start that are not timed: they allocate the optimizer's state and fill caches."""


class Learner:
    """Trains one network of one seed, a step at a time.

    Args:
        run: what is trained, and how.
        network: ``"sparse"`` or ``"dense"``.
        seed: decides initial values, topology, order of batches, what varies the examples, and moves of blocks.
        make: makes the network; :func:`~sparsekern.lab.resolved.build_places` for a learner that takes no step.

    Attributes:
        epoch: epochs completed.
        batch: batches done of the present epoch.
        steps: optimizer steps in total.

    Raises:
        ValueError: the options or the data do not fit the network, which only the network can tell.
    """

    def __init__(self, run: Run, network: str, seed: int, make: Callable[[Run, str, int], nn.Module] = build) -> None:
        self.run, self.network, self.seed = run, network, seed
        self.task, self.recipe, self.batches, self.total_steps = run.task, run.recipe, run.batches, run.steps
        self.model = make(run, network, seed).to(run.device)
        self._replica = run.world.parallel(self.model)  # what computes in training
        self.optimizer = run.recipe.optimizer.build(self.model, run.config.rate, fused=not run.world.sharded)
        self.method = self.agent = None
        if network == "sparse":
            self.method = build_method(run, self._replica, self.optimizer, seed)
            self.agent = build_agent(run, self._replica, self.optimizer, self.method)
        self._outer = self.agent or self.method  # whom to call
        self.epoch = self.batch = self.steps = 0
        self._loss_sum = self._seconds = self._last_seconds = self._early_loss_sum = 0.0
        self._milliseconds: list[float] = []
        self._spectral = network == "sparse" and run.spectral
        self._graphs: list[dict[str, Any]] = []
        self._order: tuple[int, Any] | None = None  # the epoch, and the order of its examples

    @property
    def round(self) -> int:
        """Rounds completed."""
        return self.method.round if isinstance(self.method, Lottery) else 0

    @property
    def all_epochs(self) -> int:
        """Epochs completed in all rounds."""
        return self.epoch + self.round * (self.total_steps // self.batches - self.run.rewind // self.batches)

    @property
    def all_steps(self) -> int:
        """Optimizer steps in all rounds."""
        return self.steps + self.round * (self.total_steps - self.run.rewind)

    def step(self) -> float:
        """Train on the next batch of the epoch and return its mean loss. Call finish_epoch() after the last one.

        Raises:
            ValueError: the loss is not finite.
        """
        if self.batch == 0:
            self._loss_sum, self._seconds, self._milliseconds, self._graphs = 0.0, 0.0, [], []
            self._refresh()
        batch = self.next_batch()
        self._synchronise()
        began = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = self.run.config.rate * self.recipe.schedule.factor(self.steps, self.total_steps)
        loss = self._backward(batch)
        if self.recipe.clip_norm is not None:
            clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        moved = self._outer is not None and self._outer.step()
        self._synchronise()
        spent = self._last_seconds = time.perf_counter() - began
        self._seconds += spent
        if self.steps >= WARM_UP:
            self._milliseconds.append(1e3 * spent)
        begin = self.run.rewind if self.round else 0
        if self._spectral and (moved or self.steps == begin):
            graphs = {name: asdict(spectral(layer)) for name, layer in sparse_layers(self.model).items()}
            self._graphs.append({"step": self.all_steps + 1, "layers": graphs})
        value = self.run.world.ranks.mean(loss.cpu()).item()
        if not math.isfinite(value):
            raise InputError(
                f"the loss of the {self.network} network is {value} after {self.steps} steps; choose a lower rate"
            )
        self._loss_sum += value * batch.examples
        self.batch += 1
        self.steps += 1
        if self.round == 0 and self.steps == self.run.rewind:
            self._early_loss_sum = self._loss_sum
        return value

    def finish_epoch(self) -> dict[str, Any]:
        """Close the epoch and return its row for ``metrics.jsonl``.

        ``ms_per_step`` is a median, None if not timed; ``seconds`` is the time of all steps, updates of the topology
        included. ``spectral``, where asked for: ``{"step", "layers": {name: measures}}`` at the start and after each
        update. At the end of a round the network is then rewound, to begin the next.
        """
        self.epoch, self.batch = self.epoch + 1, 0
        row: dict[str, Any] = {
            "seed": self.seed,
            "network": self.network,
            "epoch": self.all_epochs,
            "step": self.all_steps,
            "loss": self._loss_sum / self.task.examples,
            **self.evaluate(),
            "ms_per_step": statistics.median(self._milliseconds) if self._milliseconds else None,
            "seconds": self._seconds,
        }
        if self._spectral:
            row["spectral"] = self._graphs
        row |= self._outer.metrics() if self._outer is not None else {}
        if isinstance(self.method, Lottery):
            row["round"] = self.round + 1
            if self.steps == self.total_steps and self.method.next_round():
                self._rewind(self.method.rewind)
        return row

    def _rewind(self, step: int) -> None:
        """Go back to a step, of whose epoch the loss so far is known."""
        self.steps = step
        self.epoch, self.batch = divmod(step, self.batches)
        self._loss_sum, self._seconds, self._milliseconds, self._graphs = self._early_loss_sum, 0.0, [], []

    @torch.no_grad()
    def written(self) -> str | None:
        """Return a text that the network writes; None if the task has none."""
        with self._evaluation():
            return self.task.written(self.model)

    def _evaluation(self) -> AbstractContextManager[None]:
        """Return a context in which the model computes as the network that is being trained."""
        return self.method.evaluation() if isinstance(self.method, NetworkSampler) else nullcontext()

    def speed(self) -> str:
        """Return how fast the last step was, in tokens a second, for tasks that have tokens."""
        tokens = self.task.tokens(self.run.config.batch_size)
        return f"{tokens / self._last_seconds:,.0f} tokens/s" if tokens and self._last_seconds else ""

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return the metric of the network, and what else the task measures."""
        self.model.eval()
        with self._evaluation(), self._autocast():
            scores = self.task.evaluate(self.model)
        self.model.train()
        return scores

    def sizes(self) -> dict[str, float]:
        """Return what the network stores, after its first step."""
        return {
            "network_sparsity": network_sparsity(self.model),
            "stored_parameters": stored_parameters(self.model),
            "training_bytes": self.training_bytes(),
        }

    def training_bytes(self) -> int:
        """Return the bytes that training holds between steps."""
        snapshot = 0 if self.agent is None else self.agent.snapshot.bytes()
        return training_bytes(self.model, self.optimizer) + snapshot

    def state_dict(self) -> dict[str, Any]:
        """Return what, beside the model's own state, a resumed run needs to go on bit for bit."""
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "steps": self.steps,
            "loss_sum": self._loss_sum,
            "early_loss_sum": self._early_loss_sum,
            "round": self.round,
            "seconds": self._seconds,
            "milliseconds": list(self._milliseconds),
            "graphs": list(self._graphs),
            "optimizer": gathered(self.optimizer.state_dict()),
            "method": None if self._outer is None else gathered(self._outer.state_dict()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken. Load the model's own state first.

        Raises:
            ValueError: the state is not one of this training.
        """
        epoch, batch, epochs = state["epoch"], state["batch"], self.total_steps // self.batches
        if not (batch < self.batches and epoch * self.batches + batch == state["steps"] <= self.total_steps):
            raise InputError(
                f"{self.network}: step {state['steps']} is not batch {batch} of {self.batches} after {epoch} of "
                f"{epochs} epochs"
            )
        if (state["method"] is None) != (self._outer is None):
            raise InputError(f"{self.network}: the state of the method is {'' if self._outer is None else 'not '}there")
        if isinstance(self.method, Gradual) and self.method.compact:
            compact_(self.model, self.optimizer)  # the model's own state left free the slots that had gone
        self.epoch, self.batch, self.steps = epoch, batch, state["steps"]
        self._loss_sum, self._seconds = state["loss_sum"], state["seconds"]
        self._early_loss_sum = state["early_loss_sum"]
        self._milliseconds, self._graphs = list(state["milliseconds"]), list(state["graphs"])
        load_optimizer(self.optimizer, state["optimizer"])
        if self._outer is not None:
            self._outer.load_state_dict(state["method"])
        if self.round != state["round"]:
            raise InputError(f"{self.network}: the method is in round {self.round + 1}, and not {state['round'] + 1}")

    def loss(self, share: Share) -> Tensor:
        """Return the mean loss ``()`` of a part of a batch, times its weight."""
        loss = self.mean_loss(share.batch)
        return loss if share.weight == 1 else share.weight * loss

    def mean_loss(self, batch: Batch) -> Tensor:
        """Return the mean loss ``()`` of a batch."""
        with self._autocast():
            return self.task.loss(self._replica, batch)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.run.device.type, self.run.dtype, enabled=self.run.dtype is not None)

    def _backward(self, share: Share) -> Tensor:
        """Compute the gradients of the mean loss of a batch, part by part, and return that loss."""
        if self.run.config.accumulate == 1:
            return self._backward_of(lambda: self.loss(share))
        total = torch.zeros((), device=self.run.device)
        *parts, last = share.split(self.run.config.accumulate)
        with unsynchronised(self._replica):
            for part in parts:
                total += self._backward_of(partial(self.loss, part))
        return total + self._backward_of(partial(self.loss, last))

    def _backward_of(self, closure: Callable[[], Tensor]) -> Tensor:
        if self._outer is not None:
            return self._outer.backward(closure)
        loss = closure()
        loss.backward()
        return loss.detach()

    def next_batch(self) -> Share:
        """Return this rank's part of the batch of the next step; both networks see the same ones in the same order.

        Seed, epoch and step decide all that is random in it, so that nothing of it needs to be saved.
        """
        if self._order is None or self._order[0] != self.epoch:
            self._order = (self.epoch, self.run.order(self.seed, self.epoch))
        return self._part(self._order[1], self.batch)

    def _refresh(self) -> None:
        """Run AGENT's pass over the training set in an order of its own and take its snapshot; timed with the steps."""
        if self.agent is None or self.agent.every is not None:
            return
        order = self.run.order(self.seed, self.epoch, "agent order")
        began = time.perf_counter()
        shares = (self._part(order, i, "agent augment") for i in range(self.batches))
        self.agent.refresh(shares, lambda share: self.mean_loss(share.batch), size=lambda share: share.counted)
        self._synchronise()
        self._seconds += time.perf_counter() - began

    def _part(self, order: Any, number: int, purpose: str = "augment") -> Share:
        return self.run.world.part(self.run.batch(order, number, self.seed, self.epoch, purpose))

    def _synchronise(self) -> None:
        if self.run.device.type == "cuda":
            torch.cuda.synchronize(self.run.device)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the state of an optimizer that was built as this one, every tensor checked before the optimizer gets it.

    Fused optimizers take the sizes of a state on trust: too small a one makes them write beyond its end.

    Raises:
        ValueError: options other than these, but for the rate, or an entry of another shape or dtype.
    """
    groups = optimizer.state_dict()["param_groups"]
    if not _same_groups(state.get("param_groups"), groups) or not isinstance(state.get("state"), dict):
        raise InputError("the optimizer's options or parameters are not those of this run")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    kept = _entries(optimizer)
    checked: dict[int, dict[str, Tensor]] = {}
    for number, entries in state["state"].items():
        if type(number) is not int or not 0 <= number < len(parameters) or not isinstance(entries, dict):
            raise InputError(f"the optimizer's state names parameter {number!r} of {len(parameters)}")
        if entries.keys() != kept.keys():
            raise InputError(f"the optimizer's state of parameter {number} has other entries than {', '.join(kept)}")
        checked[number] = {
            key: _fitting(entries[key], f"{key} of parameter {number}", parameters[number], kept[key]) for key in kept
        }
    optimizer.load_state_dict({"state": checked, "param_groups": groups})


def _same_groups(given: Any, wanted: list[dict[str, Any]]) -> bool:
    """Return whether groups are those wanted, but for the rate, which every step sets, and how steps are computed."""
    if not isinstance(given, list) or not all(isinstance(group, dict) for group in given):
        return False
    if not all(type(group.get("lr")) is float and 0 <= group["lr"] < math.inf for group in given):
        return False
    free = {"lr": 0, "fused": None}
    return repr([group | free for group in given]) == repr([group | free for group in wanted])


def _entries(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return what an optimizer keeps for a parameter of two elements once it has stepped, by name."""
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.zeros(2)
    taken = signature(type(optimizer)).parameters
    twin = type(optimizer)([parameter], **{name: v for name, v in optimizer.defaults.items() if name in taken})
    twin.step()
    return dict(twin.state[parameter])


def _fitting(value: Any, name: str, parameter: Tensor, like: Tensor) -> Tensor:
    """Return a copy of a state's tensor in the memory format of its parameter, or alone if it is a number."""
    shape = parameter.shape if like.dim() else like.shape
    dtype = parameter.dtype if like.dim() else like.dtype
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.shape != shape or value.dtype != dtype:
        raise InputError(f"the optimizer's {name} must be {dtype} of shape {tuple(shape)}")
    if not like.dim():
        return value.clone()
    return torch.empty_like(parameter, requires_grad=False).copy_(sharded_as(parameter, value))
