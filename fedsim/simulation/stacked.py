"""The stacked engine: C clients at once, `torch.func.vmap` over the same local algorithm.

Parameters are one contiguous stack [C, *shape] per layer, moved in place. Clients are sorted by
their number of local steps, so that at every step the ones that still work are a prefix: views, no
masks over whole clients. Short batches are padded with rows of weight zero.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree as pytree

from fedsim.keys import Purpose, seed_torch, torch_seed
from fedsim.local import LocalAlgorithm, LocalSpec, Phase, propose, trained
from fedsim.optimizers import make_optimizer
from fedsim.training.clients import Schedule
from fedsim.training.work import (
    Trained,
    Work,
    Workplace,
    buffer_dict,
    by_size,
    client_lent,
    client_message,
    flatten_buffers,
)
from fedsim.types import Batch, Ids

# Of a Batch under vmap: the rate, the step's number and whether it is active are the same for all.
_BATCH_DIMS = Batch(0, 0, 0, None, None, 0, 0, 0, 0, 0, 0)  # type: ignore[arg-type]


class StackedTrainer:
    """Blocks of `block` clients.

    Args:
        place: what the clients share.
        block: C, most clients in a block.
    """

    name = "stacked"

    def __init__(self, place: Workplace, block: int) -> None:
        self.place = place
        self.block = block

    def plan(self, steps: Ids) -> list[Ids]:
        return by_size(steps, self.block)

    def train(self, work: Work, algorithm: LocalAlgorithm, states: Any) -> Trained:
        place, ids = self.place, work.ids
        clients = len(ids)
        device = place.clients.device
        seed_torch(torch_seed(place.seed, Purpose.DROPOUT, int(work.rounds[0]), int(ids[0])))
        message = client_message(work.message, place.spec)
        # One message serves all as it is; where each client has its own it is stacked like the rest.
        own, shared = (message, ()) if work.mixed else ((), message)
        msg_dim = 0 if work.mixed else None
        lent = client_lent(work.lent, place.spec)
        state, optimizer_state = states
        each = torch.arange(clients, device=device)  # gives vmap an axis where nothing else does

        def start(_: Tensor, msg: Any, lent_row: Any, state_row: Any) -> Any:
            return algorithm.init(msg, lent_row, state_row)

        started = vmap(start, in_dims=(0, msg_dim, 0, 0))(each, message, lent, state)
        x, carry = pytree.tree_map(_own, started)
        counted = torch.promote_types(place.spec.dtype, torch.float32)  # sums outgrow bfloat16
        stack = _Stack(
            own,
            lent,
            state,
            x,
            carry,
            optimizer_state,
            {name: _stacked(b, clients, work) for name, b in buffer_dict(place, work.buffers).items()},
            normaliser=torch.zeros(clients, dtype=counted, device=device),
            loss=torch.zeros(clients, dtype=counted, device=device),
            seen=torch.zeros(clients, dtype=counted, device=device),
            taken=torch.zeros(clients, dtype=torch.int64, device=device),
        )
        for number, phase in enumerate(algorithm.phases):
            spec = phase.spec or work.spec

            def schedule_of(order: Ids | slice, number: int = number, spec: LocalSpec = spec) -> Schedule:
                return Schedule(
                    place.clients,
                    ids[order],
                    work.rounds[order],
                    work.steps[order],
                    phases=algorithm.phases,
                    number=number,
                    spec=spec,
                )

            # Those still working must be a prefix; another phase may ask for another order.
            order = np.argsort(-schedule_of(slice(None)).steps, kind="stable")
            stack = _permuted(stack, order)
            stack = self._run_phase(phase, spec, shared, schedule_of(order), stack)
            if not algorithm.keeps_optimizer:
                stack = stack._replace(optimizer=())
            stack = _permuted(stack, np.argsort(order, kind="stable"))

        def end(
            _: Tensor, msg: Any, lent_row: Any, state_row: Any, x: Any, carry: Any, length: Tensor
        ) -> Any:
            return algorithm.finish(msg, lent_row, state_row, x, carry, length)

        result, new_state, metrics = vmap(end, in_dims=(0, msg_dim, 0, 0, 0, 0, 0))(
            each, message, lent, state, stack.x, stack.carry, stack.normaliser
        )
        loss = stack.loss / torch.clamp(stack.seen, min=1)
        return Trained(
            {n: place.spec.flatten(v, stacked=True) for n, v in result.vectors.items()},
            {n: v.double() for n, v in result.scalars.items()},
            pytree.tree_map(lambda leaf: leaf.detach(), (new_state, stack.optimizer)),
            stack.normaliser.double().cpu().numpy(),
            {
                "loss": loss.double().cpu().numpy(),
                **{n: v.double().cpu().numpy() for n, v in metrics.items()},
            },
            flatten_buffers(place.floating, stack.buffers, stacked=True),
            flatten_buffers(place.integers, stack.buffers, stacked=True),
            stack.taken.cpu().numpy(),
        )

    def _run_phase(
        self, phase: Phase, spec: LocalSpec, shared: Any, schedule: Schedule, stack: _Stack
    ) -> _Stack:
        """All steps of one phase; everything in `stack` is changed in place but a new optimiser state."""
        optimizer = make_optimizer(spec)
        if schedule.moving and stack.optimizer == ():
            fresh = optimizer.init(trained(phase, stack.x), clients=len(stack.taken))
            stack = stack._replace(optimizer=fresh)
        step_all = _vmapped_step(phase, spec, mixed=shared == ())
        for step in range(len(schedule)):
            active = int((schedule.steps > step).sum())
            part: _Stack = pytree.tree_map(lambda leaf, k=active: leaf[:k], stack)
            batch = schedule.stacked(step, active)._replace(buffers=part.buffers)
            msg = part.message if shared == () else shared
            vector, scale, carry, aux = step_all(msg, part.lent, part.state, part.x, part.carry, batch)
            pytree.tree_map(_overwrite, part.carry, carry)
            if not schedule.moving:
                continue
            _, _, length = optimizer.update(
                part.optimizer, trained(phase, part.x), vector, batch.lr * scale, inplace=True
            )
            part.normaliser.add_(length)
            pytree.tree_map(_overwrite, part.buffers, dict(aux.buffers))
            real = batch.mask.sum(dim=1)
            part.loss.add_(aux.loss.detach() * real)
            part.seen.add_(real)
            part.taken.add_(1)
        return stack


class _Stack(NamedTuple):
    """What C clients have in hand, every leaf with a leading C; views of it are written through.

    Args:
        message: what each client got, where they started from different versions; else ().
        lent, state: as the functions of the algorithm get them.
        x, carry, optimizer, buffers: what moves.
        normaliser, loss, seen, taken: [C] sums of step lengths, of losses over examples, of examples,
            and of steps.
    """

    message: Any
    lent: Any
    state: Any
    x: Any
    carry: Any
    optimizer: Any
    buffers: Any
    normaliser: Tensor
    loss: Tensor
    seen: Tensor
    taken: Tensor


def _permuted(stack: _Stack, order: Ids) -> _Stack:
    """The clients in another order."""
    if (order == np.arange(len(order))).all():
        return stack
    index = torch.from_numpy(order).to(stack.taken.device)
    permuted: _Stack = pytree.tree_map(lambda leaf: leaf[index], stack)
    return permuted


def _vmapped_step(phase: Phase, spec: LocalSpec, *, mixed: bool) -> Any:
    """`propose` for a stack: (message, lent, state, x, carry, batch), C of each but what is shared."""

    def step(msg: Any, lent: Any, state: Any, x: Any, carry: Any, batch: Batch) -> Any:
        return propose(phase, spec, msg, lent, state, x, carry, batch)

    return vmap(step, in_dims=(0 if mixed else None, 0, 0, 0, 0, _BATCH_DIMS), randomness="different")


def _stacked(buffer: Tensor, clients: int, work: Work) -> Tensor:
    """A buffer for each client, one of its own."""
    return buffer.clone() if work.mixed else buffer.unsqueeze(0).expand(clients, *buffer.shape).clone()


def _own(leaf: Tensor) -> Tensor:
    """A stack of its own: vmap returns expanded views where nothing was batched."""
    return leaf.clone(memory_format=torch.contiguous_format)


def _overwrite(old: Tensor, new: Tensor) -> Tensor:
    return old.copy_(new)
