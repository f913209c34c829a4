"""The stacked engine: C clients at once, `torch.func.vmap` over the same local algorithm.

Parameters are one contiguous stack [C, *shape] per layer, moved in place. Clients are sorted by
their number of local steps, so that at every step the ones that still work are a prefix: views, no
masks over whole clients. Short batches are padded with rows of weight zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree as pytree

from fedsim.buffers import Buffers
from fedsim.keys import Purpose, torch_seed
from fedsim.local import LocalAlgorithm, LocalSpec, Phase, propose
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
        optimizer_state = optimizer_state or None
        each = torch.arange(clients, device=device)  # gives vmap an axis where nothing else does

        def start(_: Tensor, lent_row: Any, state_row: Any) -> Any:
            return algorithm.init(msg, lent_row, state_row)

        x, carry = pytree.tree_map(_own, vmap(start, in_dims=(0, 0, 0))(each, lent, state))
        current = {
            name: b.unsqueeze(0).expand(clients, *b.shape).clone()
            for name, b in buffer_dict(place, buffers).items()
        }
        like = next(iter(x.tensors.values()))
        normaliser = like.new_zeros(clients)
        loss_sum, seen = like.new_zeros(clients), like.new_zeros(clients)
        taken = np.zeros(clients, np.int64)

        for phase in algorithm.phases:
            spec = phase.spec or task.spec
            optimizer = make_optimizer(spec)
            schedule = Schedule(place.clients, task, ids, phase, spec, steps)
            if schedule.moving and optimizer_state is None:
                optimizer_state = optimizer.init(x, clients=clients)
            step_all = _vmapped_step(phase, spec, msg)
            for step in range(len(schedule)):
                active = int((schedule.steps > step).sum())
                batch = schedule.stacked(step, active)._replace(
                    buffers={n: b[:active] for n, b in current.items()}
                )
                rows = _Prefix(active)
                part = rows.of(carry)
                vector, scale, new_carry, aux = step_all(
                    rows.of(lent), rows.of(state), rows.of(x), part, batch
                )
                pytree.tree_map(_overwrite, part, new_carry)
                if not schedule.moving:
                    continue
                _, _, length = optimizer.update(
                    rows.of(optimizer_state), rows.of(x), vector, batch.lr * scale, inplace=True
                )
                normaliser[:active] += length
                for name, buffer in aux.buffers.items():
                    current[name][:active] = buffer
                real = batch.mask.sum(dim=1)
                loss_sum[:active] += aux.loss.detach() * real
                seen[:active] += real
                taken[:active] += 1
            if not algorithm.keeps_optimizer:
                optimizer_state = None

        def end(_: Tensor, lent_row: Any, state_row: Any, x: Any, carry: Any, length: Tensor) -> Any:
            return algorithm.finish(msg, lent_row, state_row, x, carry, length)

        result, new_state, metrics = vmap(end)(each, lent, state, x, carry, normaliser)
        kept = optimizer_state if algorithm.keeps_optimizer else ()
        loss = loss_sum / torch.clamp(seen, min=1)
        return Trained(
            {n: place.spec.flatten(v, stacked=True) for n, v in result.vectors.items()},
            {n: v.double() for n, v in result.scalars.items()},
            pytree.tree_map(lambda leaf: leaf.detach(), (new_state, kept)),
            normaliser.double().cpu().numpy(),
            {
                "loss": loss.double().cpu().numpy(),
                **{n: v.double().cpu().numpy() for n, v in metrics.items()},
            },
            flatten_buffers(place.floating, current, stacked=True),
            flatten_buffers(place.integers, current, stacked=True),
            taken,
        )


def _vmapped_step(phase: Phase, spec: LocalSpec, msg: Any) -> Any:
    """`propose` for a stack: (lent, state, x, carry, batch), all with a leading C but shared scalars."""

    def step(lent: Any, state: Any, x: Any, carry: Any, batch: Batch) -> Any:
        return propose(phase, spec, msg, lent, state, x, carry, batch)

    return vmap(step, in_dims=(0, 0, 0, 0, _BATCH_DIMS), randomness="different")


class _Prefix:
    """Views of the first k rows of every leaf."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def of(self, tree: Any) -> Any:
        return pytree.tree_map(lambda leaf: leaf[: self.rows], tree)


def _own(leaf: Tensor) -> Tensor:
    """A stack of its own: vmap returns expanded views where nothing was batched."""
    return leaf.clone(memory_format=torch.contiguous_format)


def _overwrite(old: Tensor, new: Tensor) -> Tensor:
    return old.copy_(new)
