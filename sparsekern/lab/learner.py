"""One network on its way: model, optimizer, method, and its place in the training."""

from __future__ import annotations

import math
import statistics
import time
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from sparsekern.analysis import network_sparsity, spectral, stored_parameters, training_bytes
from sparsekern.errors import InputError
from sparsekern.lab.augment import augmented
from sparsekern.lab.build import build, build_agent, build_method
from sparsekern.lab.catalogue import find
from sparsekern.lab.config import Config
from sparsekern.lab.data import Dataset
from sparsekern.lab.optimizers import load_optimizer
from sparsekern.nn import sparse_layers
from sparsekern.topology import generator_for

WARM_UP = 5
"""Steps at the start that are not timed: they allocate the optimizer's state and fill caches."""

EVALUATION_BATCH = 512

Batch = tuple[Tensor, Tensor]
"""Images ``(B, C, H, W)`` and labels ``(B,)``."""


class Learner:
    """Trains one network of one seed, a step at a time.

    Args:
        network: ``"sparse"`` or ``"dense"``.
        config: resolved.
        data: on the device on which the network is to be.
        seed: decides initial values, topology, order of batches, what varies the images, and moves of blocks.

    Attributes:
        epoch: epochs completed.
        batch: batches done of the present epoch.
        steps: optimizer steps in total.
    """

    def __init__(self, network: str, config: Config, data: Dataset, seed: int) -> None:
        assert config.epochs is not None and config.update_every is not None  # resolved() filled them
        assert config.augment is not None
        self.recipe, self.augmentation = find(config.recipe), config.augment
        self.network, self.data, self.seed = network, data, seed
        self.batch_size = config.batch_size
        self.batches = math.ceil(data.train_images.shape[0] / config.batch_size)
        self.rate, self.total_steps = config.rate, config.epochs * self.batches
        self.device = data.train_images.device
        self.memory_format = torch.channels_last if self.recipe.channels_last else torch.contiguous_format
        self.model = build(network, config, data.image_shape, data.classes, seed).to(self.device)
        self.optimizer = self.recipe.optimizer.build(self.model, config.rate)
        self.method = self.agent = None
        if network == "sparse":
            self.method = build_method(config, self.model, self.optimizer, self.total_steps, seed)
            self.agent = build_agent(config, self.model, self.optimizer, self.method)
        self._outer = self.agent or self.method  # whom to call
        self.epoch = self.batch = self.steps = 0
        self._loss_sum = self._seconds = 0.0
        self._milliseconds: list[float] = []
        self._spectral = network == "sparse" and bool(config.part("record").get("spectral"))
        self._graphs: list[dict[str, Any]] = []
        self._order: tuple[int, Tensor] | None = None  # the epoch, and the images (N,) in its order

    def step(self) -> float:
        """Train on the next batch of the present epoch; returns its mean loss. After the last one: finish_epoch().

        Raises:
            ValueError: the loss is not finite.
        """
        if self.batch == 0:
            self._loss_sum, self._seconds, self._milliseconds, self._graphs = 0.0, 0.0, [], []
            self._refresh()
        batch = self.next_batch()
        self._wait()
        began = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * self.recipe.schedule.factor(self.steps, self.total_steps)
        if self._outer is None:
            loss = self.loss(batch)
            loss.backward()
        else:
            loss = self._outer.backward(lambda: self.loss(batch))
        if self.recipe.clip_norm is not None:
            clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        moved = self._outer is not None and self._outer.step()
        self._wait()
        spent = time.perf_counter() - began
        self._seconds += spent
        if self.steps >= WARM_UP:
            self._milliseconds.append(1e3 * spent)
        if self._spectral and (moved or self.steps == 0):
            graphs = {name: asdict(spectral(layer)) for name, layer in sparse_layers(self.model).items()}
            self._graphs.append({"step": self.steps + 1, "layers": graphs})
        value = loss.item()
        if not math.isfinite(value):
            raise InputError(
                f"the loss of the {self.network} network is {value} after {self.steps} steps; choose a lower rate"
            )
        self._loss_sum += value * batch[1].shape[0]
        self.batch += 1
        self.steps += 1
        return value

    def finish_epoch(self) -> dict[str, Any]:
        """Close the epoch and return its row for ``metrics.jsonl``.

        ``ms_per_step`` is a median, None if not timed; ``seconds`` is the time of all steps, moves of blocks included.
        ``spectral``, where asked for: ``{"step", "layers": {name: measures}}`` at the start and after each move.
        """
        self.epoch, self.batch = self.epoch + 1, 0
        row = {
            "seed": self.seed,
            "network": self.network,
            "epoch": self.epoch,
            "step": self.steps,
            "loss": self._loss_sum / self.data.train_images.shape[0],
            "test_accuracy": self._accuracy(),
            "ms_per_step": statistics.median(self._milliseconds) if self._milliseconds else None,
            "seconds": self._seconds,
        }
        if self._spectral:
            row["spectral"] = self._graphs
        return row | (self._outer.metrics() if self._outer is not None else {})

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
            "seconds": self._seconds,
            "milliseconds": list(self._milliseconds),
            "graphs": list(self._graphs),
            "optimizer": self.optimizer.state_dict(),
            "method": None if self._outer is None else self._outer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; the model's own state is loaded before.

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
        self.epoch, self.batch, self.steps = state["epoch"], state["batch"], state["steps"]
        self._loss_sum, self._seconds = state["loss_sum"], state["seconds"]
        self._milliseconds = list(state["milliseconds"])
        self._graphs = list(state.get("graphs", []))  # older states have none
        load_optimizer(self.optimizer, state["optimizer"])
        if self._outer is not None:
            self._outer.load_state_dict(state["method"])

    def loss(self, batch: Batch) -> Tensor:
        """Return the mean loss ``()`` of a batch."""
        images, labels = batch
        return cross_entropy(self.model(images), labels, label_smoothing=self.recipe.label_smoothing)

    def next_batch(self) -> Batch:
        """Return the batch that the next step trains on; both networks see the same ones in the same order.

        All that is random in it follows from seed, epoch and step: nothing of it needs to be saved.
        """
        if self._order is None or self._order[0] != self.epoch:
            self._order = (self.epoch, self._draw_order("order"))
        return self._batch(self._order[1], self.batch, "augment")

    def _refresh(self) -> None:
        """Let AGENT pass over the training set in an order of its own, and take its snapshot; timed with the steps."""
        if self.agent is None or self.agent.every is not None:
            return
        order = self._draw_order("agent order")
        began = time.perf_counter()
        self.agent.refresh((self._batch(order, i, "agent augment") for i in range(self.batches)), self.loss)
        self._wait()
        self._seconds += time.perf_counter() - began

    def _draw_order(self, purpose: str) -> Tensor:
        """Return the places of all training images ``(N,)`` in an order of this epoch."""
        count = self.data.train_images.shape[0]
        return torch.randperm(count, generator=generator_for(self.seed, purpose, self.epoch)).to(self.device)

    def _batch(self, order: Tensor, number: int, purpose: str) -> Batch:
        chosen = order[number * self.batch_size : (number + 1) * self.batch_size]
        generator = generator_for(self.seed, purpose, self.epoch, number)
        images = augmented(self.data.train_images[chosen], self.augmentation, generator)
        return images.contiguous(memory_format=self.memory_format), self.data.train_labels[chosen]

    @torch.no_grad()
    def _accuracy(self) -> float:
        self.model.eval()
        right = 0
        with nullcontext() if self.method is None else self.method.evaluation():
            for start in range(0, self.data.test_labels.shape[0], EVALUATION_BATCH):
                images = self.data.test_images[start : start + EVALUATION_BATCH]
                images = images.contiguous(memory_format=self.memory_format)
                labels = self.data.test_labels[start : start + EVALUATION_BATCH]
                right += int((self.model(images).argmax(1) == labels).sum())
        self.model.train()
        return right / self.data.test_labels.shape[0]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
