"""The batches of a block for the fused engine: many steps gathered by one selection.

The rows of a run of steps lie one behind the other, step by step, and within a step client by
client, so that each step is a view [k, B, ...] of the clients that still work. A step is as wide as
its longest real batch; what is shorter is padded with rows of weight zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedsim.keys import Purpose, bits
from fedsim.simulation.fused_layers import Activation
from fedsim.training.clients import Schedule
from fedsim.types import Ids

# Inputs gathered at once: they are read by the very next steps and should still be in the cache.
_INPUT_BYTES = 8 << 20


class StepData(NamedTuple):
    """A run of steps, R rows together.

    Args:
        shapes: (k, B) of each step.
        inputs: [R, D_in], or one client behind the other where the run is a window; targets: [R, ...].
        weights: [R], -η over the number of real rows of the batch, 0 for padding.
        owners: [R] clients of the block; positions: [R] among the client's examples, -1 for padding.
        lengths: [k] rows of `inputs` of each client of a window; taken: [k] its steps in the window;
            remaining: [k] whether more steps follow.
    """

    shapes: list[tuple[int, int]]
    inputs: Tensor
    targets: Tensor
    weights: Tensor
    owners: Ids
    positions: Ids
    lengths: Sequence[int] = ()
    taken: Sequence[int] = ()
    remaining: Sequence[bool] = ()


def steps_of(
    schedule: Schedule, rate: float, before: Sequence[Activation], *, window: int
) -> Iterator[StepData]:
    """All steps of a block of clients sorted by steps, most first.

    Args:
        rate: η; before: what is done to the inputs first.
        window: most rows of one client in a run, whose inputs then lie client by client; 0 for none.
    """
    positions, clients = schedule.positions, schedule.clients
    real = (positions >= 0).sum(axis=2)  # [C, S]
    working = (schedule.steps[:, None] > np.arange(len(schedule))).sum(axis=0)
    widths = real.max(axis=0, initial=0)
    example = clients.inputs[0].numel() * clients.dtype.itemsize
    runs = _runs(widths, window) if window else _runs(working * widths * example, _INPUT_BYTES)
    for first, last in runs:
        yield _gathered(schedule, first, last, working, widths, real, rate, before, by_client=window > 0)


def _runs(sizes: Ids, most: int) -> Iterator[tuple[int, int]]:
    """Steps [first, last) that fit together, at least one each."""
    first, held = 0, 0
    for step, size in enumerate(sizes.tolist()):
        if step > first and held + size > most:
            yield first, step
            first, held = step, 0
        held += size
    if first < len(sizes):
        yield first, len(sizes)


def _gathered(
    schedule: Schedule,
    first: int,
    last: int,
    working: Ids,
    widths: Ids,
    real: Ids,
    rate: float,
    before: Sequence[Activation],
    *,
    by_client: bool,
) -> StepData:
    clients = schedule.clients
    shapes = [(int(working[s]), int(widths[s])) for s in range(first, last)]
    steps = range(first, last)
    positions = np.concatenate(
        [schedule.positions[:k, s, :b].ravel() for s, (k, b) in zip(steps, shapes, strict=True)]
    )
    owners = np.concatenate([np.repeat(np.arange(k), b) for k, b in shapes])
    counts = np.concatenate([np.repeat(real[:k, s], b) for s, (k, b) in zip(steps, shapes, strict=True)])
    keys = None
    if clients.random_transform:
        keys = np.concatenate(
            [_keys(schedule, s, k)[:, :b].ravel() for s, (k, b) in zip(steps, shapes, strict=True)]
        )
    lengths: list[int] = []
    taken: list[int] = []
    remaining: list[bool] = []
    order = None
    if by_client:
        counted = (working[first:last] > np.arange(shapes[0][0])[:, None]).sum(axis=1)
        order, lengths = _by_client(owners, shapes, real[:, first:last], counted)
        taken = counted.tolist()
        remaining = (schedule.steps[: shapes[0][0]] > last).tolist()
    inputs, targets = clients.gather_flat(schedule.ids[owners], positions, keys, order)
    inputs = inputs.flatten(1)
    for activation in before:
        inputs = activation.forward(inputs, torch.empty_like(inputs))
    weights = torch.from_numpy(np.where(positions >= 0, -rate / np.maximum(counts, 1), 0.0))
    weights = weights.to(clients.device, clients.dtype)
    return StepData(shapes, inputs, targets, weights, owners, positions, lengths, taken, remaining)


def _by_client(
    owners: Ids, shapes: Sequence[tuple[int, int]], real: Ids, steps: Ids
) -> tuple[Ids, list[int]]:
    """Which rows, client by client in the order of their steps, without the padding at a client's end.

    Args:
        steps: [k] that each client takes.

    Returns:
        Their order, and how many each client has.
    """
    clients = shapes[0][0]
    widths = np.array([width for _, width in shapes])
    lengths = np.concatenate([[0], np.cumsum(widths)])[steps - 1] + real[np.arange(clients), steps - 1]
    order = np.argsort(owners, kind="stable")
    whole = np.bincount(owners, minlength=clients)
    place = np.arange(len(owners)) - np.repeat(np.cumsum(whole) - whole, whole)
    return order[place < lengths[owners[order]]], lengths.tolist()


def _keys(schedule: Schedule, step: int, clients: int) -> np.ndarray:
    """[k, B] of the random transform, as the other engines draw them."""
    start = schedule.first_key + (step << 32)
    rounds, ids = schedule.rounds[:clients], schedule.ids[:clients]
    width = schedule.positions.shape[2]
    words = bits(schedule.clients.seed, Purpose.TRANSFORM, rounds, ids, width, start=start)
    return words.view(np.int64)
