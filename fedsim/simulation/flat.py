"""The flat engine: one client at a time on one flat buffer.

All parameters of a copy of the model are views of one buffer: a client starts by one copy, moves by
in-place additions and reports one difference; there are no state dicts, no optimiser objects and no
`functional_call`. Any module and any local algorithm runs here. Affine algorithms under SGD are moved
directly; all others take their steps from `propose` like every driver, with a gradient function that knows
the buffer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fedsim.grads import ModelGradient
from fedsim.keys import Purpose, seed_torch, torch_seed
from fedsim.local import LocalAlgorithm, LocalSpec, propose, report_delta, trained
from fedsim.optimizers import make_optimizer
from fedsim.simulation.flat_batches import Feed
from fedsim.simulation.flat_gradient import BoundGradient
from fedsim.simulation.flat_kernels import quicken
from fedsim.simulation.flat_module import FlatModule, Layout
from fedsim.simulation.flat_precision import (
    LayoutChoice,
    Precision,
    PrecisionName,
    layout_of,
    to_layout,
)
from fedsim.training.work import (
    Trained,
    Work,
    Workplace,
    buffer_dict,
    client_lent,
    client_message,
    flatten_buffers,
)
from fedsim.types import Floats, GradFn, Ids, Message


class FlatTrainer:
    """Blocks of one client, in cohort order; short batches stay short.

    Algorithms should be made with `grad_fn`: any other gradient function is called as it is.

    Args:
        place: what the clients share; where its gradient is not the model's own (DP-SGD), that is used.
        layout: of convolutions' weights; ``auto`` is channels_last where there are any.
        precision: ``bfloat16`` runs convolutions in bfloat16, with float32 weights.

    Attributes:
        grad_fn: the gradient to make algorithms with.
    """

    name = "flat"
    block = 1

    def __init__(
        self, place: Workplace, *, layout: LayoutChoice = "auto", precision: PrecisionName = "float32"
    ) -> None:
        device = place.clients.device
        own = isinstance(place.grad_fn, ModelGradient)
        reduced = precision == "bfloat16"
        images = place.clients.anything()
        self.layout: Layout = "contiguous"
        if own:
            self.layout = layout_of(layout, place.module, images, reduced=reduced)

        def make() -> FlatModule:
            made = FlatModule(
                place.module, place.spec, place.floating, place.integers, device=device, layout=self.layout
            )
            if device.type == "cpu":
                quicken(made.module, keep_linear=reduced)
            return made

        self.bound: BoundGradient | None = None
        if isinstance(place.grad_fn, ModelGradient):
            kind = Precision(device.type, reduced, place.spec.dtype)
            self.bound = BoundGradient(make, place.grad_fn.per_example, kind)
            self.live = self.bound.live
        else:
            self.live = make()
        self.grad_fn: GradFn = self.bound or place.grad_fn
        self.place = replace(place, grad_fn=self.grad_fn)
        self._convert = to_layout if self.layout == "channels_last" else None
        self._seen: tuple[Message, Message] | None = None  # the last broadcast, flat and as Vectors

    def plan(self, steps: Ids) -> list[Ids]:
        return [np.array([i], np.int64) for i in range(len(steps))]

    def train(self, work: Work, algorithm: LocalAlgorithm, states: Any) -> Trained:
        place = self.place
        seed = torch_seed(place.seed, Purpose.DROPOUT, int(work.rounds[0]), int(work.ids[0]))
        seed_torch(seed)
        msg = self._message(work.message)
        state, optimizer_state = _first(states)
        lent = _first(client_lent(work.lent, place.spec))
        x, carry = algorithm.init(msg, lent, state)
        self.live.load(x, work.message.vectors["x"] if x is msg.vectors.get("x") else None)
        counted = torch.promote_types(place.spec.dtype, torch.float32)  # sums outgrow bfloat16
        zero = torch.zeros((), dtype=counted, device=self.live.flat.device)
        client = _Client(msg, lent, state, carry, optimizer_state or None, {}, zero, zero.clone(), 0, 0)
        if self._direct(algorithm, work.spec):
            client = self._affine(work, algorithm, client)
        else:
            client = self._general(work, algorithm, client)
        return self._finished(work, algorithm, client)

    def _direct(self, algorithm: LocalAlgorithm, spec: LocalSpec) -> bool:
        """Whether the steps are SGD along the model's gradient plus constant terms."""
        phase = algorithm.phases[0]
        own = phase.spec or spec
        return (
            algorithm.terms is not None
            and isinstance(algorithm.gradient, ModelGradient | BoundGradient)
            and self.bound is not None
            and len(algorithm.phases) == 1
            and phase.data == "batches"
            and phase.trains is None
            and own.clip_norm is None
            and own.optimizer == "sgd"
            and not algorithm.keeps_optimizer
        )

    def _affine(self, work: Work, algorithm: LocalAlgorithm, client: _Client) -> _Client:
        """x <- x - lr·d with d = g + (a + weight decay)·x + b, or its heavy-ball average."""
        assert self.bound is not None
        assert algorithm.terms is not None
        place, live = self.place, self.live
        spec = algorithm.phases[0].spec or work.spec
        if live.has_buffers:
            live.load_buffers(buffer_dict(place, work.buffers))
        a, b = algorithm.terms(client.msg, client.lent, client.state)
        pull = float(a) + spec.weight_decay
        added = None if b is None else [b.tensors[name] for name in place.spec.names]
        momentum = [torch.zeros_like(view) for view in live.views] if spec.momentum else None
        feed = self._feed(work, algorithm, 0, spec)
        lr, age = float(feed.lr), 1.0
        length, loss_sum, seen, taken = client.length, client.loss, 0, len(feed)
        for step in range(taken):
            inputs, targets = feed.examples(step)
            gradients, loss = self.bound.at(live, inputs, targets)
            if momentum is not None:
                torch._foreach_mul_(momentum, spec.momentum)  # pyright: ignore[reportPrivateImportUsage]
                _add(momentum, gradients, live.views, pull, added)
                torch._foreach_add_(live.views, momentum, alpha=-lr)  # pyright: ignore[reportPrivateImportUsage]
            else:
                _descend(live, gradients, lr, pull, added)
            length.add_(lr * age)
            age = spec.momentum * age + 1.0
            rows = len(targets)
            loss_sum.add_(loss, alpha=rows)
            seen += rows
        buffers = live.saved_buffers() if live.has_buffers else {}
        return client._replace(buffers=buffers, seen=seen, steps=taken)

    def _general(self, work: Work, algorithm: LocalAlgorithm, client: _Client) -> _Client:
        """Any algorithm, by `propose`: what `run_local` does, on the live buffer."""
        x = self.live.vector
        carry, optimizer_state, seen, taken = client.carry, client.optimizer, 0, 0
        current = buffer_dict(self.place, work.buffers)
        for number, phase in enumerate(algorithm.phases):
            spec = phase.spec or work.spec
            optimizer = make_optimizer(spec)
            feed = self._feed(work, algorithm, number, spec)
            moving = feed.moving
            own = trained(phase, x)
            if moving and optimizer_state is None:
                optimizer_state = optimizer.init(own)
            for step in range(len(feed)):
                batch = feed.batch(step)._replace(buffers=current)
                proposal = propose(phase, spec, client.msg, client.lent, client.state, x, carry, batch)
                carry = proposal.carry
                if not moving:
                    continue
                rate = batch.lr * proposal.lr_scale
                _, optimizer_state, length = optimizer.update(
                    optimizer_state, own, proposal.vector, rate, inplace=True
                )
                client.length.add_(length)
                current = dict(proposal.aux.buffers)
                client.loss.add_(proposal.aux.loss.detach(), alpha=len(batch.targets))
                seen += len(batch.targets)
                taken += 1
            if not algorithm.keeps_optimizer:
                optimizer_state = None
        return client._replace(
            carry=carry, optimizer=optimizer_state, buffers=current, seen=seen, steps=taken
        )

    def _finished(self, work: Work, algorithm: LocalAlgorithm, client: _Client) -> Trained:
        """What the client comes back with, nothing of which lies in the live buffer."""
        place, live = self.place, self.live
        if algorithm.finish is report_delta:
            delta = live.minus(client.msg.x, work.message.vectors["x"])
            vectors, scalars, state = {"delta": delta.unsqueeze(0)}, {}, client.state
            metrics: Mapping[str, Tensor] = {}
        else:
            result, state, metrics = algorithm.finish(
                client.msg, client.lent, client.state, live.vector, client.carry, client.length
            )
            vectors = {n: place.spec.flatten(v).detach().unsqueeze(0) for n, v in result.vectors.items()}
            scalars = {n: v.detach().double().unsqueeze(0) for n, v in result.scalars.items()}
        optimizer = client.optimizer if algorithm.keeps_optimizer else ()
        kept = (state, optimizer)
        loss = client.loss / max(1, client.seen)
        return Trained(
            vectors,
            scalars,
            kept if _empty(kept) else pytree.tree_map(self._kept, kept),
            _numbers(client.length),
            {"loss": _numbers(loss), **{n: _numbers(v) for n, v in metrics.items()}},
            flatten_buffers(place.floating, client.buffers, stacked=False),
            flatten_buffers(place.integers, client.buffers, stacked=False),
            np.array([client.steps], np.int64),
        )

    def _kept(self, leaf: Tensor) -> Tensor:
        """A leaf of a client's state as a row of its own."""
        leaf = leaf.detach()
        own = leaf.clone(memory_format=torch.contiguous_format) if self.live.owns(leaf) else leaf
        return own.contiguous().unsqueeze(0)

    def _message(self, message: Message) -> Message:
        """The broadcast as Vectors; the same for all clients of a version."""
        if self._seen is None or self._seen[0] is not message:
            self._seen = (message, client_message(message, self.place.spec))
        return self._seen[1]

    def _feed(self, work: Work, algorithm: LocalAlgorithm, number: int, spec: LocalSpec) -> Feed:
        return Feed(
            self.place.clients,
            int(work.ids[0]),
            int(work.rounds[0]),
            int(work.steps[0]),
            phases=algorithm.phases,
            number=number,
            spec=spec,
            convert=self._convert,
        )


class _Client(NamedTuple):
    """What one client has in hand.

    Args:
        msg, lent, state: as the functions of the algorithm get them.
        carry, optimizer, buffers: what moves beside the live buffer.
        length, loss: 0-d sums of step lengths and of losses over examples, added to in place.
        seen, steps: examples and steps so far.
    """

    msg: Message
    lent: Any
    state: Any
    carry: Any
    optimizer: Any
    buffers: dict[str, Tensor]
    length: Tensor
    loss: Tensor
    seen: int
    steps: int


def _descend(
    live: FlatModule, gradients: tuple[Tensor, ...], lr: float, pull: float, added: list[Tensor] | None
) -> None:
    """x <- (1 - lr·pull) x - lr·g - lr·b."""
    if pull:
        live.flat.mul_(1.0 - lr * pull)
    torch._foreach_add_(live.views, gradients, alpha=-lr)  # pyright: ignore[reportPrivateImportUsage]
    if added is not None:
        torch._foreach_add_(live.views, added, alpha=-lr)  # pyright: ignore[reportPrivateImportUsage]


def _add(
    total: list[Tensor],
    gradients: tuple[Tensor, ...],
    views: list[Tensor],
    pull: float,
    added: list[Tensor] | None,
) -> None:
    """total <- total + g + pull·x + b."""
    torch._foreach_add_(total, gradients)  # pyright: ignore[reportPrivateImportUsage]
    if pull:
        torch._foreach_add_(total, views, alpha=pull)  # pyright: ignore[reportPrivateImportUsage]
    if added is not None:
        torch._foreach_add_(total, added)  # pyright: ignore[reportPrivateImportUsage]


def _numbers(value: Tensor) -> Floats:
    """[1] of a 0-d tensor."""
    return np.array([float(value)])


def _first(rows: Any) -> Any:
    """The only client's part of a tree of stacks of one."""
    return rows if _empty(rows) else pytree.tree_map(lambda leaf: leaf[0], rows)


def _empty(tree: Any) -> bool:
    """Whether a tree is () or a pair of those: most clients keep nothing, and walking a tree takes long."""
    return type(tree) is tuple and all(type(part) is tuple and not part for part in tree)
