"""Training methods in the Trainer of Lightning."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from sparsekern.errors import InputError
from sparsekern.integrations.methods import (
    AnyMethod,
    Factory,
    LogTo,
    MethodSpec,
    evaluating,
    log,
    needs_closure,
    numbers,
    open_log,
)
from sparsekern.nn import sparse_layers

__all__ = ["SparseCallback"]


class SparseCallback(Callback):
    """Moves the blocks of a module's sparse layers while Lightning trains it.

    ::

        trainer = Trainer(max_epochs=10, callbacks=[SparseCallback("rigl", update_every=100)])
        trainer.fit(module, loader)

    The method is built when training begins, with the optimizer that holds the sparse layers, and steps at each of its
    real steps, in automatic and in manual optimization: accumulated batches and steps that gradient scaling skips do
    not count. Its state is in every checkpoint, and ``trainer.fit(..., ckpt_path=...)`` goes on exactly.

    VR-PGE, Top-KAST and AGENT run the passes over a batch themselves, so they need manual optimization: in
    ``training_step`` write ``loss = callback.method.backward(lambda: ...)`` in the place of ``self.manual_backward``.
    Validation during the training is that of the likeliest network of VR-PGE, and of Top-KAST's forward set.

    Args:
        method: one of :data:`sparsekern.training.METHODS`, such as ``"set"``; or a function of the module and the
            optimizer that returns the method.
        log_to: where numbers go besides the trainer's loggers: a folder for TensorBoard, a ``SummaryWriter``, or an
            object with ``log(dict)``.
        layers: log the numbers of each layer, and not of the whole model only.
        options: arguments of the method of that name. ``stop`` is three quarters of the training if it is not given.

    Attributes:
        method: the method, from the beginning of the training on; before, None.
    """

    def __init__(self, method: str | Factory, *, log_to: LogTo = None, layers: bool = False, **options: Any) -> None:
        self.spec = MethodSpec(method, options)
        self.log_to = open_log(log_to)
        self.layers = layers
        self.method: AnyMethod | None = None
        self._saved: dict[str, Any] | None = None
        self._logged = 0
        self._validation = ExitStack()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build the method, and load its state if the trainer resumes."""
        steps = trainer.estimated_stepping_batches
        last = self._saved if self.method is None else self.method.state_dict()
        method = self.method = self.spec.build(
            pl_module, _optimizer_of(trainer, pl_module), int(steps) if math.isfinite(steps) else 0
        )
        if needs_closure(method) and pl_module.automatic_optimization:
            raise InputError(
                f"{type(method).__name__} runs the passes over a batch itself: set self.automatic_optimization = "
                "False, and call callback.method.backward(lambda: ...) in training_step"
            )
        saved = self._saved or last
        if trainer.global_step and saved is None:
            raise InputError(
                f"the checkpoint of step {trainer.global_step} holds no state of {type(method).__name__}: it was saved "
                "without this callback. To train on from its weights alone, load those and leave out ckpt_path"
            )
        if trainer.global_step and saved is not None:
            method.load_state_dict(saved)
        self._saved = None
        self._logged = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Call the method's step, which updates the topology where it is due, and log its metrics."""
        assert self.method is not None
        self.method.step()
        step = trainer.global_step
        every = max(1, int(getattr(trainer, "log_every_n_steps", 1)))
        if step // every == self._logged // every:
            return
        self._logged = step
        found = numbers(self.method, self.layers)
        for logger in trainer.loggers:
            logger.log_metrics(found, step=step)
        if trainer.is_global_zero:
            log(self.log_to, found, step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the network that VR-PGE or Top-KAST would choose now."""
        self._validation.enter_context(evaluating(self.method))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute with all blocks again."""
        self._validation.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Compute with all blocks again."""
        self._validation.close()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the method; ``method.metrics()`` and ``method.state_dict()`` still answer."""
        if self.method is not None:
            self.method.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the method's state, for the checkpoint; empty before the training."""
        return {} if self.method is None else self.method.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a method's state until the method is built."""
        self._saved = state_dict or None


def _optimizer_of(trainer: Trainer, module: LightningModule) -> torch.optim.Optimizer:
    """Return the optimizer that holds the sparse layers of a module."""
    values = {id(layer.values) for layer in sparse_layers(module).values()}
    for optimizer in trainer.optimizers:
        if any(id(parameter) in values for group in optimizer.param_groups for parameter in group["params"]):
            return optimizer
    raise InputError("no optimizer of configure_optimizers holds a sparse layer; make the module sparse in __init__")
