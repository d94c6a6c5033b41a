"""Training methods in the Trainer of Transformers."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

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
from sparsekern.training import AGENT

STATE = "sparsekern"
"""The entry of an optimizer's first group under which its state dict holds that of the method."""


class SparseCallback(TrainerCallback):
    """Moves the blocks of a model's sparse layers while a Trainer trains it.

    ::

        sk.sparsify_(model, 0.9, 16)
        trainer = Trainer(model, args, train_dataset=data, callbacks=[SparseCallback("rigl", update_every=100)])
        trainer.train()

    The method is built when training begins, with the Trainer's optimizer, and steps at each of its real steps:
    accumulated batches and steps that gradient scaling skips do not count. Its state is part of the optimizer's, in
    ``optimizer.pt`` of every checkpoint, so that ``trainer.train(resume_from_checkpoint=...)`` goes on exactly.

    Its numbers are added to what the Trainer logs, for callbacks that come after this one. Those of ``report_to`` come
    before: give their writer or run as ``log_to``, or use :class:`SparseTrainer`. VR-PGE and AGENT need that.

    Args:
        method: one of :data:`sparsekern.training.METHODS`, such as ``"set"``; or a function of the model and the
            optimizer that returns the method.
        log_to: where numbers go too: a folder for TensorBoard, a ``SummaryWriter``, or an object with ``log(dict)``.
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
        self.hands_closure = False  # see SparseTrainer
        self._hook: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Build the method, and load its state if the Trainer resumes."""
        optimizer = kwargs["optimizer"]
        saved = optimizer.param_groups[0].pop(STATE, None)
        method = self.method = self.spec.build(kwargs["model"], optimizer, state.max_steps)
        if needs_closure(method) and not self.hands_closure:
            raise InputError(
                f"{type(method).__name__} runs the passes over a batch itself, which a callback cannot: use "
                "SparseTrainer(..., sparse=SparseCallback(...))"
            )
        if saved is not None:
            method.load_state_dict(saved)
        elif state.global_step:
            raise InputError(
                f"the checkpoint of step {state.global_step} holds no state of {type(method).__name__}: it was saved "
                "without SparseCallback, or with save_only_model=True. To train on from its weights alone, load it "
                "with from_pretrained and leave out resume_from_checkpoint"
            )
        if self._hook is not None:
            self._hook.remove()

        def add_state(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
            state_dict["param_groups"][0][STATE] = method.state_dict()

        self._hook = method.optimizer.register_state_dict_post_hook(add_state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Call the method's step, which updates the topology where it is due."""
        assert self.method is not None
        self.method.step()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the method's numbers to those of a training step."""
        if self.method is None or logs is None or "loss" not in logs:
            return
        found = numbers(self.method, self.layers)
        logs |= found
        state.log_history[-1] |= found
        if state.is_world_process_zero:
            log(self.log_to, {key: n for key, n in logs.items() if isinstance(n, (int, float))}, state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the method; ``method.metrics()`` still answers."""
        if self.method is not None:
            self.method.close()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


class SparseTrainer(Trainer):
    """A Trainer whose step belongs to a training method, as VR-PGE and AGENT need it; the others do not.

    ::

        trainer = SparseTrainer(model, args, train_dataset=data, sparse=SparseCallback("vrpge", sparsity=0.9))

    The loss is computed as ever, by :meth:`compute_loss`. AGENT takes its snapshot at the beginning of each epoch,
    unless it is built with ``every``. Numbers of the method are in all logs, those of ``report_to`` too.

    Args:
        sparse: the callback that builds the method.
        others: arguments of :class:`transformers.Trainer`.
    """

    def __init__(self, *others: Any, sparse: SparseCallback, **more: Any) -> None:
        super().__init__(*others, **more)
        self.sparse = sparse
        sparse.hands_closure = True
        self.add_callback(sparse)
        self.add_callback(_Snapshots(self))

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Compute the loss of a batch and the method's gradients; returns the loss, detached."""
        method = self.sparse.method
        assert method is not None
        if not needs_closure(method):
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
            return loss
        model.train()
        inputs = self._prepare_inputs(inputs)
        return method.backward(
            lambda: self.loss_of(model, inputs, num_items_in_batch), scaler=getattr(self.accelerator, "scaler", None)
        )

    def loss_of(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None) -> Tensor:
        """Return the part that a batch has of the loss of an optimizer step."""
        with self.compute_loss_context_manager():
            loss: Any = self.compute_loss(model, dict(inputs), num_items_in_batch=num_items_in_batch)
        if self.args.n_gpu > 1:
            loss = loss.mean()
        scaled = self.compute_loss_func is not None or (
            self.model_accepts_loss_kwargs and num_items_in_batch is not None
        )
        return cast(Tensor, loss if scaled else loss / self.current_gradient_accumulation_steps)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate the network that is trained: the likeliest of VR-PGE, or that of Top-KAST's forward set."""
        with evaluating(self.sparse.method):
            found: dict[str, float] = super().evaluate(*args, **kwargs)
        return found

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log numbers, those of the method among them."""
        if self.sparse.method is not None and "loss" in logs:
            logs = logs | numbers(self.sparse.method, self.sparse.layers)
        super().log(logs, *args, **kwargs)


class _Snapshots(TrainerCallback):
    """Takes AGENT's snapshots, from the batches of the epoch."""

    def __init__(self, trainer: SparseTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer, method = self.trainer, self.trainer.sparse.method
        if not isinstance(method, AGENT) or method.every is not None or not method.gamma:
            return
        if state.epoch is not None and not float(state.epoch).is_integer():
            return  # resumed in the middle of an epoch, whose snapshot is in the checkpoint
        model = trainer.model_wrapped
        batches = (trainer._prepare_inputs(batch) for batch in kwargs["train_dataloader"])

        def loss(batch: dict[str, Any]) -> Tensor:
            found: Any = trainer.compute_loss(model, dict(batch))
            return cast(Tensor, found)

        method.refresh(batches, loss)
