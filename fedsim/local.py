"""The client half of an algorithm, and the loop driver that runs it for one client.

A local algorithm says in which *direction* to go; the driver owns the parameters and moves them. It
is driven in four ways: by `run_local` (one client), by the stacked engine (C clients under vmap), by
a remote client (`run_local` on its own data), and by an attacker, who differentiates through
`run_local` with respect to candidate data. Contract of its functions: pure; no Python decision on a
tensor's value; nothing drawn; shapes do not depend on data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fedsim.optimizers import Optimizer, clip, make_optimizer
from fedsim.types import Aux, Batch, GradFn, Message
from fedsim.vector import Vector


@dataclass(frozen=True, slots=True)
class LocalSpec:
    """Local training, the ``[client]`` table; it travels with every task.

    Args:
        epochs: passes over the client's data, where `steps` is not given.
        steps: local steps, reshuffling at each pass; wins over `epochs`.
        batch_size: examples of a step; 0 takes all of the client's data at once.
        lr: local learning rate of round 0.
        lr_decay: factor per round.
        momentum: of the local optimiser; reset at every task.
        weight_decay: coupled, as in ``torch.optim.SGD`` (decoupled for ``adamw``).
        clip_norm: bound on the L2 norm of each direction, None for none.
        optimizer: ``sgd``, ``adam`` or ``adamw``.
    """

    epochs: int = 1
    steps: int | None = None
    batch_size: int = 16
    lr: float = 0.2
    lr_decay: float = 1.0
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip_norm: float | None = None
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"

    def at_round(self, round_index: int) -> LocalSpec:
        """The same with the rate that this round uses: lr · lr_decay^round."""
        return replace(self, lr=self.lr * self.lr_decay**round_index, lr_decay=1.0)


class Direction(NamedTuple):
    """Where one local step goes: x <- optimiser(x, vector, lr * lr_scale)."""

    vector: Vector
    lr_scale: Tensor | float = 1.0


class Result(NamedTuple):
    """What a client reports: named Vectors and named 0-d scalars."""

    vectors: Mapping[str, Vector]
    scalars: Mapping[str, Tensor] = {}


DirectionFn = Callable[..., tuple[Direction, Any, Aux]]  # Any: the algorithm's own carry
Terms = Callable[[Message, Any, Any], tuple[Tensor | float, Vector | None]]


class Phase(NamedTuple):
    """One stretch of local training.

    Args:
        direction: (msg, lent, client_state, x, carry, batch) -> Direction, carry, aux.
        spec: local training of this phase where it differs from the task's.
        data: ``batches`` moves x at each step; ``full`` is one pass at fixed x, in order, whose
            results the algorithm adds up in `carry` with ``batch.weight``.
        trains: prefixes of the parameter names that move, None for all.
        clips: who applies `clip_norm`: the ``driver``, to the vector that `direction` returns, or the
            ``direction`` itself, to a part of it.
    """

    direction: DirectionFn
    spec: LocalSpec | None = None
    data: Literal["batches", "full"] = "batches"
    trains: tuple[str, ...] | None = None
    clips: Literal["driver", "direction"] = "driver"


class LocalAlgorithm(NamedTuple):
    """The client half of an algorithm (Any: its own state and carry types).

    Args:
        fresh: (msg) -> client_state, at first participation; a state is never None.
        init: (msg, lent, client_state) -> x, carry, where local training starts.
        phases: what is done in order; most algorithms have one phase.
        finish: (msg, lent, client_state, x, carry, normaliser) -> Result, client_state, metrics.
        personal: (msg, client_state) -> x that this client evaluates with, None for the global x.
        terms, gradient: of an affine algorithm, what `affine` was built from, for engines that fuse them.
        keeps_optimizer: the optimiser's state persists between the tasks of a client.
    """

    fresh: Callable[[Message], Any]
    init: Callable[[Message, Any, Any], tuple[Vector, Any]]
    phases: tuple[Phase, ...]
    finish: Callable[..., tuple[Result, Any, Mapping[str, Tensor]]]
    personal: Callable[[Message, Any], Vector] | None = None
    terms: Terms | None = None
    gradient: GradFn | None = None
    keeps_optimizer: bool = False


def stateless(msg: Message) -> tuple[()]:
    """`fresh` of an algorithm that keeps nothing on the client."""
    return ()


def from_broadcast(msg: Message, lent: Any, client_state: Any) -> tuple[Vector, Any]:
    """Default `init`: start at the broadcast model, carry nothing."""
    return msg.x, ()


def report_delta(
    msg: Message, lent: Any, client_state: Any, x: Vector, carry: Any, normaliser: Tensor
) -> tuple[Result, Any, Mapping[str, Tensor]]:
    """Default `finish`: delta = local minus broadcast; the state stays."""
    return Result({"delta": x - msg.x}), client_state, {}


def no_terms(msg: Message, lent: Any, client_state: Any) -> tuple[float, None]:
    """Plain SGD: nothing is added to the gradient."""
    return 0.0, None


def affine(
    grad_fn: GradFn,
    terms: Terms = no_terms,
    *,
    fresh: Callable[[Message], Any] = stateless,
    init: Callable[[Message, Any, Any], tuple[Vector, Any]] = from_broadcast,
    finish: Callable[..., tuple[Result, Any, Mapping[str, Tensor]]] = report_delta,
) -> LocalAlgorithm:
    """SGD plus additive terms: direction = g + a·x + b with (a, b) = terms(msg, lent, state).

    g is what `grad_fn` gives: the gradient, or one taken uphill (`fedsim.uphill`). `a` is a number or 0-d
    tensor and `b` a Vector or None; both are constant during a task, which is what lets a fused engine
    apply them inside a layer's backward.
    """

    def direction(
        msg: Message, lent: Any, client_state: Any, x: Vector, carry: Any, batch: Batch
    ) -> tuple[Direction, Any, Aux]:
        g, aux = grad_fn(x, batch)
        a, b = terms(msg, lent, client_state)
        if isinstance(a, Tensor) or a != 0.0:
            g = g + a * x
        if b is not None:
            g = g + b
        return Direction(g), carry, aux

    return LocalAlgorithm(fresh, init, (Phase(direction),), finish, terms=terms, gradient=grad_fn)


def trained(phase: Phase, vector: Vector) -> Vector:
    """The entries of a Vector that move in this phase; shares their tensors."""
    if phase.trains is None:
        return vector
    return Vector({n: t for n, t in vector.tensors.items() if n.startswith(phase.trains)})


class Proposal(NamedTuple):
    """One clipped direction, ready for the optimiser."""

    vector: Vector
    lr_scale: Tensor
    carry: Any
    aux: Aux


def propose(
    phase: Phase,
    spec: LocalSpec,
    msg: Message,
    lent: Any,
    state: Any,
    x: Vector,
    carry: Any,
    batch: Batch,
) -> Proposal:
    """`direction`, restricted to the parameters that train, then the norm clip if it is the driver's.

    Every driver takes its steps from here: the loop calls it, the stacked engine vmaps it.
    """
    (vector, scale), carry, aux = phase.direction(msg, lent, state, x, carry, batch)
    vector = trained(phase, vector)
    if spec.clip_norm is not None and phase.clips == "driver":
        vector = clip(vector, spec.clip_norm)
    return Proposal(vector, torch.as_tensor(scale, dtype=batch.lr.dtype), carry, aux)


class LocalOutcome(NamedTuple):
    """What one client's local training yields.

    Args:
        result: what is reported.
        client_state: to keep, once the server has accepted the update.
        normaliser: 0-d, sum of effective step lengths; NaN where the optimiser has none.
        buffers: the model's buffers after training.
        loss: 0-d, training loss averaged over the examples seen while x moved.
        metrics: of `finish`.
        steps: local steps taken.
        optimizer_state: after the last phase.
    """

    result: Result
    client_state: Any
    normaliser: Tensor
    buffers: Mapping[str, Tensor]
    loss: Tensor
    metrics: Mapping[str, Tensor]
    steps: int
    optimizer_state: Any


def run_local(
    algorithm: LocalAlgorithm,
    msg: Message,
    lent: Any,
    client_state: Any,
    batches: Callable[[Phase, LocalSpec], Iterable[Batch]],
    *,
    spec: LocalSpec,
    buffers: Mapping[str, Tensor] | None = None,
    optimizer_state: Any = None,
    differentiable: bool = False,
) -> LocalOutcome:
    """Train one client: the loop driver.

    Args:
        batches: the batches of a phase; `Batch.buffers` is filled in here.
        optimizer_state: to continue from, for algorithms that keep it.
        differentiable: move x out of place, so that the outcome can be differentiated with respect
            to the batches; in place otherwise.
    """
    x, carry = algorithm.init(msg, lent, client_state)
    if not differentiable:
        x = x.clone()
    current = dict(buffers or {})
    like = next(iter(x.tensors.values()))
    counted = torch.promote_types(like.dtype, torch.float32)  # sums outgrow bfloat16
    loss_sum, count, normaliser = (like.new_zeros((), dtype=counted) for _ in range(3))
    steps = 0
    for phase in algorithm.phases:
        phase_spec = phase.spec or spec
        optimizer: Optimizer = make_optimizer(phase_spec)
        moving = phase.data == "batches"
        if moving and optimizer_state is None:
            optimizer_state = optimizer.init(trained(phase, x))
        for batch in batches(phase, phase_spec):
            batch = batch._replace(buffers=current)
            step = propose(phase, phase_spec, msg, lent, client_state, x, carry, batch)
            carry = step.carry
            if not moving:
                continue
            rate = batch.lr * step.lr_scale
            moved, optimizer_state, length = optimizer.update(
                optimizer_state, trained(phase, x), step.vector, rate, inplace=not differentiable
            )
            x = Vector({**x.tensors, **moved.tensors})
            normaliser = normaliser + length
            current = dict(step.aux.buffers)
            rows = batch.mask.sum()
            loss_sum = loss_sum + step.aux.loss.detach() * rows
            count = count + rows
            steps += 1
        if not algorithm.keeps_optimizer:
            optimizer_state = None
    result, new_state, metrics = algorithm.finish(msg, lent, client_state, x, carry, normaliser)
    loss = loss_sum / torch.clamp(count, min=1)
    return LocalOutcome(result, new_state, normaliser, current, loss, metrics, steps, optimizer_state)
