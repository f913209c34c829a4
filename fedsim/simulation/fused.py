"""The fused engine: C clients at once, forward and backward by hand, updates within the backward.

For stacks of linear layers under plain SGD with additive terms. A layer's update is one product
that adds to its weights, `W <- β W - η dzᵀ x`, so no gradient is ever written or read again, and the
memory that a step touches is halved. Clients are sorted by their number of local steps, so that at
every step the ones that still work are a prefix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fedsim.errors import ModelError
from fedsim.local import LocalAlgorithm, from_broadcast, report_delta
from fedsim.simulation.fused_data import steps_of
from fedsim.simulation.fused_first import Eager, First
from fedsim.simulation.fused_fit import layers_for, unfit
from fedsim.simulation.fused_layers import Layers
from fedsim.simulation.fused_lazy import Lazy
from fedsim.simulation.fused_losses import LOSSES
from fedsim.simulation.fused_order import permuted, restored
from fedsim.simulation.fused_passes import descend
from fedsim.simulation.fused_stacks import Moving, MovingLayer, Scratch
from fedsim.simulation.fused_sums import BlockSum
from fedsim.simulation.fused_task import AffineTask
from fedsim.simulation.fused_uphill import Climb
from fedsim.training.clients import Schedule
from fedsim.training.work import Trained, Work, Workplace, by_work, client_lent, client_message
from fedsim.types import Floats, Ids
from fedsim.uphill import UphillGradient
from fedsim.vector import Vector

# From this size on a layer's weights live in the rows [C, D] that are reported: a product into
# strided memory costs a little more for each client, and what is saved is one pass over all weights.
_IN_ROWS_BYTES = 256 << 10
# Rows of a client between two updates of a large first layer: with more of them the products with its
# weights are faster, and the table of the inputs' products grows.
_WINDOW_ROWS = 64
# The same where only the sum of the updates is wanted: the weights are then neither read nor written.
_SUMMED_ROWS = 256
# Parameters of one block: half of a last-level cache of 32 MB.
_BLOCK_BYTES = 16 << 20


class FusedTrainer:
    """Blocks of `block` clients.

    Args:
        place: what the clients share.
        block: C, most clients in a block.

    Attributes:
        room: makes the memory of reported rows, None for memory of its own.

    Raises:
        ModelError: the model is not made of linear layers and pointwise activations.
    """

    name = "fused"

    def __init__(self, place: Workplace, block: int) -> None:
        self.place = place
        self.block = block
        layers = layers_for(place)
        if isinstance(layers, str):
            raise _refused(layers)
        self.layers: Layers = layers
        self.loss = LOSSES[place.clients.data.dataset.task]
        self.scratch = Scratch(place.spec.dtype, place.clients.device)
        self.uphill_scratch = Scratch(place.spec.dtype, place.clients.device)
        self.room: Callable[[tuple[int, ...], torch.dtype], Tensor] | None = None

    def plan(self, steps: Ids) -> list[Ids]:
        return by_work(steps, self.block)

    def train(self, work: Work, algorithm: LocalAlgorithm, states: Any) -> Trained:
        reason = unfit(work.spec, algorithm, self.place.grad_fn)
        if reason is not None:
            raise _refused(reason)
        order = np.argsort(-work.steps, kind="stable")
        if (order == np.arange(len(order))).all():
            return self._train(work, algorithm, states)
        sorted_work, sorted_states = permuted(work, states, order)
        trained = self._train(sorted_work, algorithm, sorted_states)
        return restored(trained, np.argsort(order, kind="stable"))

    def _train(self, work: Work, algorithm: LocalAlgorithm, states: Any) -> Trained:
        """Clients sorted by steps, most first."""
        place, spec, clients = self.place, self.place.spec, len(work.ids)
        message = client_message(work.message, spec)
        lent = client_lent(work.lent, spec)
        state, optimizer_state = states
        task = AffineTask(algorithm, message, lent, state, work.mixed, clients, place.clients.device)
        schedule = Schedule(
            place.clients,
            work.ids,
            work.rounds,
            work.steps,
            phases=algorithm.phases,
            number=0,
            spec=work.spec,
        )
        rate = float(schedule.lr)
        motion = task.motion(rate, work.spec.weight_decay)
        stays = algorithm.init is from_broadcast and not work.mixed
        reports_delta = stays and algorithm.finish is report_delta
        leap = reports_delta and len(schedule) <= 1
        sums: BlockSum | None = None
        if work.weights is not None and reports_delta and motion.common:
            sums = BlockSum(spec, work.weights, place.clients.device, norms=work.norms)
        carry: Any = ()
        if stays:
            start: Vector | None = message.x
            rows, values = self._room(clients, reported=reports_delta, summed=sums is not None)
        else:
            start, rows = None, None
            x, carry = task.start()
            values = {name: _own(t) for name, t in x.tensors.items()}
        moving = {
            name: Moving(
                name, values[name], None if start is None else start.tensors[name], motion, leap=leap
            )
            for name in spec.names
        }
        active = int((work.steps > 0).sum())
        uphill = algorithm.gradient if isinstance(algorithm.gradient, UphillGradient) else None
        losses, seen = self._run(
            schedule, rate, moving, uphill, leaps=reports_delta, active=active, sums=sums
        )
        normaliser = _lengths(schedule.lr, work.steps)
        vectors: dict[str, Tensor] = {}
        scalars: dict[str, Tensor] = {}
        metrics: dict[str, Floats] = {}
        summed = None if sums is None else sums.result()
        if sums is not None and summed is None:
            return self._train(replace(work, weights=None), algorithm, states)
        if sums is None:
            for parameter in moving.values():
                parameter.settle(active)
        if rows is not None:
            assert start is not None
            vectors = {"delta": self._report(rows, moving, start)}
        elif sums is None:
            length = torch.from_numpy(normaliser).to(place.clients.device)
            result, state, found = task.finish(Vector(values), carry, length)
            vectors = {name: self._flattened(v, clients) for name, v in result.vectors.items()}
            scalars = {name: v.double() for name, v in result.scalars.items()}
            metrics = {name: v.double().cpu().numpy() for name, v in found.items()}
        return Trained(
            vectors,
            scalars,
            pytree.tree_map(lambda leaf: leaf.detach(), (state, optimizer_state)),
            normaliser.astype(np.float64),
            {"loss": losses / np.maximum(seen, 1), **metrics},
            None,
            None,
            np.asarray(work.steps, np.int64).copy(),
            summed=summed,
        )

    def _room(self, clients: int, *, reported: bool, summed: bool) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Memory for the rows that are reported and for each parameter's stack, which may lie in them."""
        spec, device = self.place.spec, self.place.clients.device
        rows: Tensor | None = None
        if reported and not summed:
            make = self.room or (lambda shape, dtype: torch.empty(shape, dtype=dtype, device=device))
            rows = make((clients, spec.size), spec.dtype)
        values: dict[str, Tensor] = {}
        for (name, part), shape in zip(spec.slices().items(), spec.shapes, strict=True):
            size = part.stop - part.start
            if rows is not None and size * spec.dtype.itemsize >= _IN_ROWS_BYTES:
                values[name] = rows[:, part].view(clients, *shape)
            elif reported:
                values[name] = self.scratch.take(f"stack {name}", clients, *shape)
            else:
                values[name] = torch.empty((clients, *shape), dtype=spec.dtype, device=device)
        return rows, values

    def _flattened(self, vector: Vector, clients: int) -> Tensor:
        """[C, D] of a stack, where reported rows shall lie."""
        spec = self.place.spec
        parts = [vector.tensors[name].reshape(clients, -1) for name in spec.names]
        if self.room is None:
            return torch.cat(parts, 1)
        return torch.cat(parts, 1, out=self.room((clients, spec.size), spec.dtype))

    def _report(self, rows: Tensor, moving: dict[str, Moving], start: Vector) -> Tensor:
        """Local minus broadcast as [C, D]."""
        for (name, part), shape in zip(self.place.spec.slices().items(), self.place.spec.shapes, strict=True):
            out = rows[:, part].view(len(rows), *shape)
            stack = moving[name]
            moved = stack.leaps_from
            torch.sub(stack.values[:moved], start.tensors[name], out=out[:moved])
            if out.data_ptr() != stack.values.data_ptr():
                out[moved:].copy_(stack.values[moved:])
        return rows

    def _run(
        self,
        schedule: Schedule,
        rate: float,
        moving: dict[str, Moving],
        uphill: UphillGradient | None,
        *,
        leaps: bool,
        active: int,
        sums: BlockSum | None,
    ) -> tuple[Floats, Floats]:
        """All steps; [C] sums of the losses over examples, and of examples."""
        once = sums if len(schedule) == 1 else None
        layers = [
            MovingLayer(
                dense,
                moving[dense.weight],
                moving[dense.bias] if dense.bias else None,
                self.scratch,
                once,
            )
            for dense in self.layers.dense
        ]
        clients = len(schedule.ids)
        losses, seen = np.zeros(clients), np.zeros(clients)
        window = self._window(schedule, longest=_SUMMED_ROWS if sums is not None else _WINDOW_ROWS)
        first: First = Eager(layers[0])
        if window:
            first = Lazy(layers[0], self.scratch, leaps=leaps, sums=sums, whole=uphill is not None)
        climb = None if uphill is None else Climb(uphill, rate, layers, self.uphill_scratch)
        for data in steps_of(schedule, rate, self.layers.before, window=window):
            loss = self.loss(data.targets, data.weights, self.layers.dense[-1].outputs)
            first.open(data)
            if climb is None:
                descend(data, first, layers, loss)
            else:
                climb.steps(
                    data, first, loss, self.loss(data.targets, data.weights, self.layers.dense[-1].outputs)
                )
            first.close()
            real = data.positions >= 0
            of_rows = loss.losses().double().cpu().numpy()
            losses += np.bincount(data.owners[real], of_rows[real], minlength=clients)
            seen += np.bincount(data.owners[real], minlength=clients)
        if sums is not None:
            for layer in layers[1:] if window else layers:
                layer.add_changes(sums, active)
        return losses, seen

    def _window(self, schedule: Schedule, *, longest: int) -> int:
        """Rows of a client for which the first layer waits with its update, 0 where it does not pay.

        Args:
            longest: window, if it holds all rows of the client with most of them.
        """
        size = self.layers.dense[0].inputs * self.layers.dense[0].outputs * self.place.spec.dtype.itemsize
        if self.place.clients.device.type != "cpu" or size < _IN_ROWS_BYTES or len(schedule) < 2:
            return 0
        if int((schedule.positions >= 0).any(axis=0).sum()) <= longest:
            return longest
        return _WINDOW_ROWS if 2 * schedule.positions.shape[2] <= _WINDOW_ROWS else 0


def fused_block(place: Workplace, cohort: int, *, sums_only: bool) -> int:
    """C: as many clients as keep the stacked parameters and their data near the last-level cache.

    Args:
        sums_only: no update is made, and most parameters are not stacked.
    """
    parameters = place.spec.size * place.spec.dtype.itemsize
    most = 64 << 20 if place.clients.device.type == "cuda" or sums_only else _BLOCK_BYTES
    return int(np.clip(most // max(1, parameters), 1, max(1, min(cohort, 1024))))


def _lengths(lr: Tensor, steps: Ids) -> np.ndarray:
    """[C] sums of the steps' lengths, added one by one as the other drivers do."""
    dtype = np.float64 if lr.dtype == torch.float64 else np.float32
    sums = np.concatenate([[0], np.cumsum(np.full(int(steps.max(initial=0)), float(lr), dtype))])
    return np.asarray(sums.astype(dtype)[steps])


def _own(leaf: Tensor) -> Tensor:
    """A stack of its own: vmap returns expanded views where nothing was batched."""
    return leaf.clone(memory_format=torch.contiguous_format)


def _refused(why: str) -> ModelError:
    return ModelError(
        "this run cannot use the fused engine",
        code="FS-MOD-033",
        where="[engine] name = 'fused'",
        why=why,
        hint="use engine 'auto', 'stacked' or 'loop'",
    )
