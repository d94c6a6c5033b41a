"""AGENT: gradients corrected by those of an earlier state of the network, as far as the two go together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparsekern.errors import InputError
from sparsekern.nn import refuse_sharded
from sparsekern.topology.arguments import check_kind
from sparsekern.training.agent.checks import NOT_SHARDED, check_options, check_parallel, check_parts
from sparsekern.training.agent.correction import Correction
from sparsekern.training.agent.extra import ExtraCost
from sparsekern.training.agent.prepass import pass_over
from sparsekern.training.agent.snapshot import Snapshot
from sparsekern.training.agent.weighting import from_losses, smoothed
from sparsekern.training.attachment import Attached
from sparsekern.training.base import Method, stepped
from sparsekern.training.closures import backpropagate, loss_of
from sparsekern.training.followers import OnMove
from sparsekern.training.optimizer_state import unwrapped
from sparsekern.training.passes import Randomness, perturbed
from sparsekern.training.saved_state import check_like
from sparsekern.training.scores import is_finite

AGENT_STATE_VERSION = 2


class AGENT(Attached):
    """Adaptive gradient correction around a training method, for any optimizer.

    Lei, Xu, Zhang, He and Mallick, "Balance is Essence: Accelerating Sparse Training via Adaptive Gradient Correction",
    CPAL 2024. For the gradient ``g_new`` of a batch the optimizer gets ``g_new - gamma c (g_old - g_mean)``: ``g_old``
    is the gradient of the same batch at a snapshot of the weights, ``g_mean`` the mean gradient there, and ``c`` in
    [0, 1] says how far the snapshot still speaks for the network. Wrap a method, take a snapshot an epoch, and call
    on the wrapper what you would call on the method::

        agent = sk.AGENT(model, optimizer, method=sparse)
        for epoch in range(epochs):
            agent.refresh(loader, lambda batch: loss_fn(model(batch[0]), batch[1]))
            for x, y in loader:
                agent.backward(lambda: loss_fn(model(x), y))
                optimizer.step(); optimizer.zero_grad(set_to_none=True)
                agent.step()

    The snapshot is evaluated in the model itself, whose tensors it trades places with for the pass, on the topology it
    was taken on. Blocks that moved since are not corrected. A method that grows by gradients sees the uncorrected one,
    gradient clipping the corrected one. Extra passes see the same dropout as the pass they belong to, and leave no
    trace in running statistics of norms. A method that draws networks (VR-PGE) is corrected once it has chosen one;
    until then :meth:`refresh` does nothing.

    Holds, beside a plain training, twice the values and one index; during a step one more copy of the values. With
    ``estimate="losses"`` the first interval has c = 0 and makes no extra pass a step.

    Args:
        model: may be wrapped in DistributedDataParallel, and then should be given so.
        optimizer: steps by the corrected gradients, to which it adds weight decay and momentum.
        method: the one that moves the blocks; None if nothing moves them.
        gamma: damps the correction, in [0, 1]; 0 turns AGENT off, bit for bit.
        alpha: how much of c the newest estimate is, in (0, 1].
        estimate: how c is found. ``"losses"``, as the paper: from the covariance of the losses of the present and the
            snapshot's weights over the batches of :meth:`refresh`, one more forward pass each. It tends to be near 1,
            because some batches are hard for both; ``gamma`` does most of the work. ``"gradients"``: from the inner
            products of the gradients during the steps, which costs no pass, and allows a larger ``gamma``.
        scope: with ``"gradients"``: one c for all (``"global"``), or one a module (``"layer"``).
        batches: take so many batches of what :meth:`refresh` is given; None for all. With few, keep ``gamma`` small:
            what their mean gets wrong, every step until the next snapshot gets wrong alike.
        every: with ``"gradients"``: take a snapshot every so many optimizer steps, without a pass over batches. The
            mean gradient is then that of the steps since the snapshot.
        process_group: the ranks that share one model. Default: all, where torch.distributed is in use.

    Raises:
        ValueError: a number or name out of range, or a method of another model or optimizer.
        TypeError: the optimizer is not a :class:`torch.optim.Optimizer`, or the method no :class:`Method`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        method: Method | None = None,
        gamma: float = 0.1,
        alpha: float = 0.3,
        estimate: str = "losses",
        scope: str = "global",
        batches: int | None = None,
        every: int | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        optimizer = unwrapped(optimizer)
        check_parts(model, optimizer, method)
        check_options(gamma, alpha, estimate, scope, batches, every)
        if gamma > 0:
            check_parallel(model)
        self.model, self.optimizer, self.method = model, optimizer, method
        self.gamma, self.alpha, self.estimate, self.scope = gamma, alpha, estimate, scope
        self.batches, self.every = batches, every
        self.process_group = process_group
        self.snapshot = Snapshot(
            model, None if method is None else lambda name, t, on_move: method.follow(t, layer=name, on_move=on_move)
        )
        groups = {name: name.rpartition(".")[0] if scope == "layer" else "" for name in self.snapshot.parameters}
        self.c = dict.fromkeys(groups.values(), 0.0)
        self.since = 0  # optimizer steps since the snapshot
        self.cost = ExtraCost()
        self._ready = False  # whether there is a snapshot whose mean is known
        self._correction = Correction(
            model, self.snapshot, groups, learns=estimate == "gradients", cost=self.cost, process_group=process_group
        )
        self.attach([optimizer])
        if method is not None:
            self._freeze = method._freeze
        self.hook("after", "_after_step")

    def __repr__(self) -> str:
        return (
            f"AGENT(gamma={self.gamma}, alpha={self.alpha}, estimate={self.estimate!r}, scope={self.scope!r}, "
            f"c={self._mean_c():.3g}, {self.method!r})"
        )

    # The three verbs, and what a method has besides.

    def backward(
        self,
        closure: Callable[..., Tensor],
        *,
        scaler: torch.amp.GradScaler | None = None,
        perturb: Callable[[], Any] | None = None,
    ) -> Tensor:
        """Compute the loss and the corrected gradients: ``agent.backward(lambda: loss_fn(model(x), y))``.

        Runs the closure once more, at the snapshot. It must do the same each time; see :meth:`VRPGE.backward`. Several
        calls before an optimizer step add up, each with its part of the loss.

        Args:
            closure: computes the loss ``()`` of one batch, the forward of the model included.
            scaler: scales the loss before the backward.
            perturb: adversarial training: makes a perturbed batch by attacks on the present model, once for both
                passes; the closure takes what it returns. Statistics of norms and gradients of parameters stay as they
                are.

        Returns:
            The loss of the present weights, detached and not scaled.
        """
        self.check_open()
        refuse_sharded(dict(self.snapshot.layers.values()), NOT_SHARDED)
        if perturb is not None:
            closure = perturbed(self.model, closure, perturb)
        if not self._is_active():
            return self._host_backward(closure, scaler)
        if self.every is not None and not self._ready:
            self.refresh()
        if not self._ready or (self.estimate == "losses" and not any(self.c.values())):
            return self._host_backward(closure, scaler)
        if self.method is not None:
            self.method.see_gradients()
        with self.cost.timed():
            self._correction.weights = {group: self.gamma * c for group, c in self.c.items()}
            randomness = Randomness(self.model)
            with self._exchanging():
                self._correction.subtract(closure, scaler)
            randomness.restore()
        loss = self._host_backward(closure, scaler)
        with self.cost.timed():
            self._correction.note(scaler)
        return loss

    def step(self) -> bool:
        """Call it after ``optimizer.step()``, in place of the method's; returns whether blocks moved."""
        self.check_open()
        moved = self.method.step() if self.method is not None else False
        if moved:
            self._correction.variance.skip()
        if self.every is not None and self._ready and self.since >= self.every:
            self.refresh()
        return moved

    def refresh(
        self,
        batches: Iterable[Any] | None = None,
        loss: Callable[[Any], Tensor] | None = None,
        *,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        """Estimate c and take a new snapshot, with its mean gradient: once an epoch, or every some hundred steps.

        Best right after blocks have moved. Each rank brings its own part of the batches.

        Args:
            batches: of the training set, clean ones in adversarial training. A batch counts by the rows of its first
                tensor. None with ``estimate="gradients"``: no pass; the mean is taken during the steps that follow.
            loss: the loss ``()`` of one batch, by the model.
            scaler: as in :meth:`backward`; a batch that overflows does not count.

        Raises:
            ValueError: no batch came, or none was given and c needs them.
        """
        self.check_open()
        refuse_sharded(dict(self.snapshot.layers.values()), NOT_SHARDED)
        if not self._is_active():
            return
        if (batches is None) != (loss is None):
            raise InputError("refresh() takes batches and their loss together: refresh(loader, lambda batch: ...)")
        if batches is None and self.estimate == "losses":
            raise InputError("refresh() needs batches and a loss: c is estimated from losses; or estimate='gradients'")
        with self.cost.timed():
            self.cost.recount()
            if self.estimate == "gradients" and self.since:
                self._smooth(self._correction.products.estimates())
            self._ready = False  # should a pass fail
            if batches is None or loss is None:
                for mean in self.snapshot.mean.values():
                    mean.zero_()
                self._correction.averaged = 0
            else:
                with self._exchanging():
                    losses = pass_over(
                        self.model,
                        self.snapshot,
                        islice(batches, self.batches),
                        loss,
                        scaler=scaler,
                        cost=self.cost,
                        group=self.process_group,
                    )
                if self.estimate == "losses":
                    self._smooth([from_losses(*losses)])
                self._correction.averaged = None
            self.snapshot.take()
            self._ready = all(is_finite(mean) for mean in self.snapshot.mean.values())
        self.since = 0
        self._correction.begin_step()
        self._correction.variance.restart()

    def evaluation(self) -> AbstractContextManager[None]:
        """Return a context in which the model is the network that is being trained: :meth:`Method.evaluation`."""
        return nullcontext() if self.method is None else self.method.evaluation()

    def follow(self, target: Tensor | nn.Module, *, layer: str | None = None, on_move: OnMove = "zero") -> None:
        """Let something else follow the blocks: :meth:`Method.follow`; without a method nothing moves."""
        if self.method is not None:
            self.method.follow(target, layer=layer, on_move=on_move)

    def metrics(self) -> dict[str, float]:
        """Return the numbers of :meth:`Method.metrics`, and more; waits for the device.

        ``c`` (over modules the mean, with ``c/*`` of each); ``corrected`` fraction of the blocks that still are where
        they were at the snapshot; ``variance_ratio`` of the corrected to the plain gradient since the snapshot, from a
        sample of its elements; ``extra_flops`` and ``extra_seconds`` of all passes that a plain training does not make
        (:class:`~sparsekern.training.agent.extra.ExtraCost`).
        """
        numbers: dict[str, float] = {} if self.method is None else self.method.metrics()
        if self.scope == "layer":
            numbers |= {f"c/{group}": c for group, c in self.c.items()}
        return numbers | {
            "c": self._mean_c(),
            "corrected": self.snapshot.corrected(),
            "variance_ratio": self._correction.variance.value(),
            "extra_flops": self.cost.flops,
            "extra_seconds": self.cost.seconds,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, the method's state included; take it between steps.

        Refers to the snapshot's tensors, as an optimizer's state does to its own.
        """
        return {
            "version": AGENT_STATE_VERSION,
            "method": None if self.method is None else self.method.state_dict(),
            "c": dict(self.c),
            "since": self.since,
            "ready": self._ready,
            "averaged": self._correction.averaged,
            "snapshot": self.snapshot.state_dict(),
            "products": self._correction.products.sums.clone(),
            "variance": self._correction.variance.state_dict(),
            "cost": self.cost.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken; the model's own state is loaded before.

        Raises:
            ValueError: the state is of another version, other parameters or another method.
        """
        check_kind("state", state, dict, "what state_dict() returned")
        version = state.get("version")
        if type(version) is not int or version != AGENT_STATE_VERSION or "snapshot" not in state:
            raise InputError(f"the state is none of AGENT's of version {AGENT_STATE_VERSION}")
        c = state.get("c")
        if (
            (state.get("method") is None) != (self.method is None)
            or not isinstance(c, dict)
            or c.keys() != self.c.keys()
        ):
            raise InputError("the state is of AGENT with another method or scope; build it as the one that was saved")
        check_like(state, self.state_dict())
        if self.method is not None:
            self.method.check_state(state["method"])
        self._correction.variance.check_state(state["variance"])
        self.snapshot.load_state_dict(state["snapshot"])
        if self.method is not None:
            self.method.load_state_dict(state["method"])
        self.c, self.since = dict(state["c"]), state["since"]
        self._ready, self._correction.averaged = state["ready"], state["averaged"]
        self._correction.products.sums.copy_(state["products"])
        self._correction.variance.load_state_dict(state["variance"])
        self.cost.load_state_dict(state["cost"])
        self._correction.begin_step()

    # Its end, and copies.

    def leave(self) -> None:
        """Act no more; the blocks move on, but nothing of this follows them."""
        if self.method is not None:
            for tensor in self.snapshot.followers:
                self.method.followers.remove(tensor)
        super().leave()

    def close(self) -> None:
        """Act no more, and close the method: :meth:`Method.close`."""
        if self.method is not None:
            self.method.close()
        super().close()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.method is not None:
            self._freeze = self.method._freeze

    # A training step.

    @contextmanager
    def _exchanging(self) -> Iterator[None]:
        """Let the snapshot and the model trade places in what follows, and nobody evaluate the model meanwhile."""
        with self.writing():
            yield
        if self.method is not None:
            self.method.note_values()

    def _is_active(self) -> bool:
        return self.gamma > 0 and (self.method is None or self.method.settled)

    def _host_backward(self, closure: Callable[[], Tensor], scaler: torch.amp.GradScaler | None) -> Tensor:
        if self.method is not None:
            return self.method.backward(closure, scaler=scaler)
        return backpropagate(loss_of(closure), scaler)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self.method is not None and self.method.closed:
            return
        if stepped(optimizer):
            self.since += 1
            self._correction.commit()
        self._correction.begin_step()

    def _smooth(self, estimates: list[float | None]) -> None:
        for group, estimate in zip(self.c, estimates, strict=True):
            self.c[group] = smoothed(self.c[group], estimate, self.alpha)

    def _mean_c(self) -> float:
        return sum(self.c.values()) / len(self.c)
