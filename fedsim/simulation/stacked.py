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

from fedsim.buffers import Buffers
from fedsim.keys import Purpose, torch_seed
from fedsim.local import LocalAlgorithm, LocalSpec, Phase, propose, trained
from fedsim.optimizers import make_optimizer
from fedsim.simulation.clients import Schedule
from fedsim.simulation.trainer import (
    Trained,
    Workplace,
    buffer_dict,
    by_size,
    client_lent,
    client_message,
    flatten_buffers,
)
from fedsim.types import Batch, Ids, Task

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

    def train(
        self,
        task: Task,
        ids: Ids,
        steps: Ids,
        algorithm: LocalAlgorithm,
        states: Any,
        buffers: Buffers,
    ) -> Trained:
        place = self.place
        clients = len(ids)
        device = place.clients.device
        torch.manual_seed(torch_seed(place.seed, Purpose.DROPOUT, task.round_index, int(ids[0])))
        msg = client_message(task.message, place.spec)
        lent = client_lent(task.lend(ids), place.spec)
        state, optimizer_state = states
        each = torch.arange(clients, device=device)  # gives vmap an axis where nothing else does

        def start(_: Tensor, lent_row: Any, state_row: Any) -> Any:
            return algorithm.init(msg, lent_row, state_row)

        x, carry = pytree.tree_map(_own, vmap(start, in_dims=(0, 0, 0))(each, lent, state))
        counted = torch.promote_types(place.spec.dtype, torch.float32)  # sums outgrow bfloat16
        stack = _Stack(
            lent,
            state,
            x,
            carry,
            optimizer_state,
            {
                name: b.unsqueeze(0).expand(clients, *b.shape).clone()
                for name, b in buffer_dict(place, buffers).items()
            },
            normaliser=torch.zeros(clients, dtype=counted, device=device),
            loss=torch.zeros(clients, dtype=counted, device=device),
            seen=torch.zeros(clients, dtype=counted, device=device),
            taken=torch.zeros(clients, dtype=torch.int64, device=device),
        )
        for number, phase in enumerate(algorithm.phases):
            spec = phase.spec or task.spec
            counts = Schedule(place.clients, task, ids, algorithm.phases, number, spec, steps).steps
            # Those still working must be a prefix; another phase may ask for another order.
            order = np.argsort(-counts, kind="stable")
            ordered = ids[order]
            schedule = Schedule(place.clients, task, ordered, algorithm.phases, number, spec, steps[order])
            stack = _permuted(stack, order)
            stack = self._run_phase(phase, spec, msg, schedule, stack)
            if not algorithm.keeps_optimizer:
                stack = stack._replace(optimizer=())
            stack = _permuted(stack, np.argsort(order, kind="stable"))

        def end(_: Tensor, lent_row: Any, state_row: Any, x: Any, carry: Any, length: Tensor) -> Any:
            return algorithm.finish(msg, lent_row, state_row, x, carry, length)

        result, new_state, metrics = vmap(end)(each, lent, state, stack.x, stack.carry, stack.normaliser)
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
        self, phase: Phase, spec: LocalSpec, msg: Any, schedule: Schedule, stack: _Stack
    ) -> _Stack:
        """All steps of one phase; everything in `stack` is changed in place but a new optimiser state."""
        optimizer = make_optimizer(spec)
        if schedule.moving and stack.optimizer == ():
            fresh = optimizer.init(trained(phase, stack.x), clients=len(stack.taken))
            stack = stack._replace(optimizer=fresh)
        step_all = _vmapped_step(phase, spec, msg)
        for step in range(len(schedule)):
            active = int((schedule.steps > step).sum())
            part: _Stack = pytree.tree_map(lambda leaf, k=active: leaf[:k], stack)
            batch = schedule.stacked(step, active)._replace(buffers=part.buffers)
            vector, scale, carry, aux = step_all(part.lent, part.state, part.x, part.carry, batch)
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
        lent, state: as the functions of the algorithm get them.
        x, carry, optimizer, buffers: what moves.
        normaliser, loss, seen, taken: [C] sums of step lengths, of losses over examples, of examples,
            and of steps.
    """

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


def _vmapped_step(phase: Phase, spec: LocalSpec, msg: Any) -> Any:
    """`propose` for a stack: (lent, state, x, carry, batch), all with a leading C but shared scalars."""

    def step(lent: Any, state: Any, x: Any, carry: Any, batch: Batch) -> Any:
        return propose(phase, spec, msg, lent, state, x, carry, batch)

    return vmap(step, in_dims=(0, 0, 0, 0, _BATCH_DIMS), randomness="different")


def _own(leaf: Tensor) -> Tensor:
    """A stack of its own: vmap returns expanded views where nothing was batched."""
    return leaf.clone(memory_format=torch.contiguous_format)


def _overwrite(old: Tensor, new: Tensor) -> Tensor:
    return old.copy_(new)
