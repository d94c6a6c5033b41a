"""AGENT: gradients corrected by those of an earlier state of the network.

Lei, Xu, Zhang, He and Mallick, "Balance is Essence: Accelerating Sparse Training via Adaptive Gradient Correction",
CPAL 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparsekern.errors import InputError
from sparsekern.nn import sparse_layers
from sparsekern.nn.sharded import parallel_modules
from sparsekern.topology.arguments import check_choice, check_kind, check_number, check_whole
from sparsekern.training.agent.correction import Correction, pass_over
from sparsekern.training.agent.snapshot import ExtraCost, Snapshot
from sparsekern.training.attachment import Attached, NetworkSampler, check_like, unwrapped
from sparsekern.training.base import Method

AGENT_STATE_VERSION = 2


class AGENT(Attached):
    """Adaptive gradient correction around a training method, for any optimizer (Lei et al., CPAL 2024).

    In place of the gradient ``g_new`` of a batch, the optimizer gets ``g_new - gamma c (g_old - g_mean)``: ``g_old`` is
    the gradient of the same batch at a snapshot of the weights, ``g_mean`` the mean gradient there, and ``c`` in [0, 1]
    says how well the snapshot still represents the network. Wrap a method, take a snapshot each epoch, and call the
    wrapper in place of the method::

        agent = sk.AGENT(model, optimizer, method=sparse)
        for epoch in range(epochs):
            agent.refresh(loader, lambda batch: loss_fn(model(batch[0]), batch[1]))
            for x, y in loader:
                agent.backward(lambda: loss_fn(model(x), y))
                optimizer.step(); optimizer.zero_grad(set_to_none=True)
                agent.step()

    The snapshot is evaluated in the model itself: for that pass they exchange their contents, topology included. Blocks
    that moved since are not corrected. A method that grows by gradients sees the uncorrected gradient, gradient
    clipping the corrected one. Extra passes have the same dropout as the pass that they belong to, and do not change
    running statistics of norms. VR-PGE is corrected once it has chosen a network; until then :meth:`refresh` does
    nothing.

    Under ``fully_shard`` the snapshot is sharded as the parameters are, and gradients of each backward are reduced over
    ranks: ``set_requires_gradient_sync(False)`` does nothing.

    Needs memory for twice the values and one index, in a step for three times. With ``estimate="losses"``, c is 0 and
    steps make no extra pass until the second snapshot.

    Args:
        model: the model; if it is wrapped in DistributedDataParallel, the wrapper.
        optimizer: gets the corrected gradients, to which it adds weight decay and momentum.
        method: moves the blocks; None if no block moves.
        gamma: damping factor of the correction, in [0, 1]; 0 turns AGENT off, bit for bit.
        alpha: weight of the newest estimate in c, in (0, 1].
        estimate: how c is estimated. ``"losses"``, as in the paper: from the covariance of the losses of present and
            snapshot's weights over the batches of :meth:`refresh`, with one more forward pass each. It tends to be near
            1, because the same batches are hard for both, and ``gamma`` matters most. ``"gradients"``: from inner
            products of gradients in the steps, which needs no pass and allows a larger ``gamma``.
        scope: with ``"gradients"``: ``"global"``, one c for all parameters, or ``"layer"``, one for each module.
        batches: number of batches that :meth:`refresh` uses; None for all. With few, keep ``gamma`` small.
        every: with ``"gradients"``: steps between snapshots without a pass over batches. Their mean gradient is that of
            the steps that follow.
        process_group: the ranks that train one model. Default: all, where torch.distributed is in use.

    Raises:
        ValueError: a number or name is out of range, or the method is of another model or optimizer.
        TypeError: the optimizer is not an optimizer, or the method no :class:`Method`.
        NotImplementedError: the model is in DistributedDataParallel with ``static_graph``, or sharded in another way
            than by ``fully_shard`` on one mesh.
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
        _check_options(gamma, alpha, estimate, scope, batches, every)
        _check_parts(model, optimizer, method, gamma)
        self.model, self.optimizer, self.method = model, optimizer, method
        self.gamma, self.alpha, self.estimate, self.scope = gamma, alpha, estimate, scope
        self.batches, self.every = batches, every
        self.snapshot = Snapshot(model, process_group, None if method is None else method.follow)
        groups = {name: name.rpartition(".")[0] if scope == "layer" else "" for name in self.snapshot.parameters}
        self.c = dict.fromkeys(groups.values(), 0.0)
        self.since = 0  # optimizer steps since the snapshot
        self.cost = ExtraCost()
        self._ready = False  # whether there is a snapshot with a mean gradient
        self._correction = Correction(self.snapshot, groups, learns=estimate == "gradients", cost=self.cost)
        self.attach([optimizer])
        if method is not None:
            self._freeze = method._freeze

    def __repr__(self) -> str:
        return (
            f"AGENT(gamma={self.gamma}, alpha={self.alpha}, estimate={self.estimate!r}, scope={self.scope!r}, "
            f"c={self._mean_c():.3g}, {self.method!r})"
        )

    def backward(
        self,
        closure: Callable[..., Tensor],
        *,
        scaler: torch.amp.GradScaler | None = None,
        perturb: Callable[[], Any] | None = None,
    ) -> Tensor:
        """Compute the loss and the corrected gradients: ``agent.backward(lambda: loss_fn(model(x), y))``.

        Runs the closure a second time, at the snapshot, as :meth:`VRPGE.backward`. Gradients of several calls add up.

        Args:
            closure: computes the loss ``()`` of one batch, the forward of the model included.
            scaler: scales the loss before the backward.
            perturb: for adversarial training: returns a batch perturbed by attacks on the present model, with which the
                closure is called in both passes. It is called once; norm statistics and gradients do not change.

        Returns:
            The loss, detached and not scaled.
        """
        self.check_open()
        self.snapshot.reshard()
        if perturb is not None:
            with self.snapshot.extra_passes():
                closure = partial(closure, perturb())
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
            with self._exchanging():
                self._correction.subtract(closure, scaler)
        loss = self._host_backward(closure, scaler)
        with self.cost.timed():
            self._correction.note(scaler)
        return loss

    def step(self) -> bool:
        """Call :meth:`Method.step`, and take a snapshot if it is due with ``every``; returns whether blocks moved."""
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
        size: Callable[[Any], int] | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        """Estimate c, and take a new snapshot and its mean gradient: once an epoch, best right after blocks have moved.

        Each rank gives its own part of the batches; under ``fully_shard`` all give the same number of them.

        Args:
            batches: of the training set; clean ones in adversarial training. None with ``estimate="gradients"``: no
                pass, and the mean gradient is that of the steps that follow.
            loss: computes the loss ``()`` of one batch.
            size: returns the number of examples that a batch counts as, by which it is weighted. Default: the number of
                rows of its first tensor.
            scaler: as in :meth:`backward`; a batch that overflows does not count.

        Raises:
            ValueError: there are no batches, or none are given but c needs them, or ranks give other numbers of them.
        """
        self.check_open()
        self.snapshot.reshard()
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
            self._ready = False  # in case a pass fails
            if batches is None or loss is None:
                for mean in self.snapshot.mean.values():
                    mean.zero_()
                self._correction.averaged = 0
            else:
                with self._exchanging():
                    some = islice(batches, self.batches)
                    losses = pass_over(self.snapshot, some, loss, size=size, scaler=scaler, cost=self.cost)
                if self.estimate == "losses":
                    self._smooth([losses.estimate()])
                self._correction.averaged = None
            self.snapshot.take()
            self._ready = self.snapshot.has_mean()
        self.since = 0
        self._correction.begin_step()
        self._correction.variance.restart()

    def evaluation(self) -> AbstractContextManager[None]:
        """Return a context in which the model is the network that VR-PGE would choose now; otherwise it is as it is."""
        return self.method.evaluation() if isinstance(self.method, NetworkSampler) else nullcontext()

    def follow(self, target: Tensor | nn.Module, **options: Any) -> None:
        """Call :meth:`Method.follow` with these arguments; without a method, nothing moves."""
        if self.method is not None:
            self.method.follow(target, **options)

    def metrics(self) -> dict[str, float]:
        """Return the metrics of :meth:`Method.metrics` and AGENT's own; synchronises the device.

        ``c`` (the mean over modules, and ``c/*`` of each); ``corrected`` fraction of blocks that have not moved since
        the snapshot; ``variance_ratio`` variance of the corrected over that of the plain gradient since the snapshot,
        from a sample of elements; ``extra_flops`` and ``extra_seconds`` of all passes that a plain training does not
        make (:class:`~sparsekern.training.agent.snapshot.ExtraCost`).
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
        """Return what a resumed run needs, including the method's state. Call it between steps.

        The snapshot's tensors are not copied, as in an optimizer's state.
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
        """Load what :meth:`state_dict` returned. Load the model's own state before.

        Raises:
            ValueError: the state is of another version, method, or set of parameters.
        """
        check_kind("state", state, dict, "what state_dict() returned")
        version = state.get("version")
        if type(version) is not int or version != AGENT_STATE_VERSION or "snapshot" not in state:
            raise InputError(f"the state is none of AGENT's of version {AGENT_STATE_VERSION}")
        c, alone = state.get("c"), state.get("method") is None
        if alone != (self.method is None) or not isinstance(c, dict) or c.keys() != self.c.keys():
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

    def detach(self) -> None:
        """Remove all hooks and followers; the method goes on."""
        if self.method is not None:
            for tensor in self.snapshot.same.values():
                self.method.followers.remove(tensor)
        super().detach()

    def close(self) -> None:
        """Remove all hooks, and close the method."""
        if self.method is not None:
            self.method.close()
        super().close()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.method is not None:
            self._freeze = self.method._freeze

    @contextmanager
    def _exchanging(self) -> Iterator[None]:
        """Exclude evaluations by other threads while the snapshot is in the model."""
        with self.writing():
            yield
        if self.method is not None:
            self.method.note_values()

    def _is_active(self) -> bool:
        method: object = self.method
        return self.gamma > 0 and (not isinstance(method, NetworkSampler) or method.finished)

    def _host_backward(self, closure: Callable[[], Tensor], scaler: torch.amp.GradScaler | None) -> Tensor:
        if self.method is not None:
            return self.method.backward(closure, scaler=scaler)
        return super().backward(closure, scaler=scaler)

    def after_step(self, made: bool) -> None:
        """Add what the step tells about c, and start the next one."""
        if self.method is not None and self.method.closed:
            return
        if made:
            self.since += 1
            self._correction.commit()
        self._correction.begin_step()

    def _smooth(self, estimates: list[float | None]) -> None:
        for group, estimate in zip(self.c, estimates, strict=True):
            if estimate is not None:  # equation 5
                self.c[group] = (1 - self.alpha) * self.c[group] + self.alpha * estimate

    def _mean_c(self) -> float:
        return sum(self.c.values()) / len(self.c)


def _check_options(
    gamma: float, alpha: float, estimate: str, scope: str, batches: int | None, every: int | None
) -> None:
    """Raise ValueError if an option is out of range, or two options contradict each other."""
    check_number("gamma", gamma, "a number in [0, 1]", lambda gamma: 0 <= gamma <= 1)
    check_number("alpha", alpha, "a number in (0, 1]", lambda alpha: 0 < alpha <= 1)
    check_choice("estimate", estimate, ("losses", "gradients"))
    check_choice("scope", scope, ("global", "layer"))
    for name, value in (("batches", batches), ("every", every)):
        if value is not None:
            check_whole(name, value, 1)
    if estimate == "losses" and (scope == "layer" or every is not None):
        name, what = ("scope", "'layer'") if scope == "layer" else ("every", str(every))
        raise InputError(
            f"{name} is {what}, but the losses of batches give one c after a pass; estimate must be gradients",
            parameter=name,
        )


def _check_parts(model: nn.Module, optimizer: torch.optim.Optimizer, method: Method | None, gamma: float) -> None:
    """Raise an error if model, optimizer and method do not belong together, or gradients cannot be corrected."""
    if gamma > 0 and any(module.static_graph for module in parallel_modules(model)):  # no_sync fails an assertion
        raise NotImplementedError(
            "the model is in DistributedDataParallel(static_graph=True), which reduces every backward over ranks, and "
            "AGENT makes some that must not be; leave static_graph out"
        )
    if method is None:
        return
    if not isinstance(method, Method):
        raise TypeError(f"method is a {type(method).__name__}; it must be a sparsekern.Method, or None")
    method.check_open()
    layers = sparse_layers(model).values()
    if method.optimizer is not optimizer or {*map(id, layers)} != {*map(id, method.layers.values())}:
        raise InputError("method is of another model or optimizer; build both of the same two", parameter="method")
