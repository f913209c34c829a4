"""The virtual clients' data: gathered by index from one array, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fedsim.data.batching import batch_positions, batches_per_epoch, pass_positions, step_counts
from fedsim.data.federated import FederatedData
from fedsim.keys import Purpose, bits
from fedsim.local import LocalSpec, Phase
from fedsim.types import Batch, Ids, Task


class Schedule:
    """The batches of a block of clients in one phase, made step by step.

    Args:
        clients: whose data.
        ids, rounds, steps: [C] clients, keys of their random streams, local steps.
        phases, number: of the algorithm, and which of them this is.
        spec: of this phase; one with its own table follows that instead of `steps`, and a
            `full` phase takes one pass.
    """

    def __init__(
        self,
        clients: ClientData,
        ids: Ids,
        rounds: Ids,
        steps: Ids,
        *,
        phases: Sequence[Phase],
        number: int,
        spec: LocalSpec,
    ) -> None:
        phase = phases[number]
        self.clients, self.ids, self.rounds = clients, ids, rounds
        self.sizes = clients.sizes(ids)
        self.moving = phase.data == "batches"
        if self.moving:
            self.steps = steps if phase.spec is None else step_counts(self.sizes, phase.spec)
            steps = self.steps
            self.positions = batch_positions(
                clients.seed, self.rounds, ids, self.sizes, spec, steps, phase=number
            )
        else:
            self.steps = batches_per_epoch(self.sizes, spec)
            self.positions = pass_positions(self.sizes, spec)
        self.per_epoch = np.maximum(batches_per_epoch(self.sizes, spec), 1)
        self.lr = torch.tensor(spec.lr, dtype=clients.dtype, device=clients.device)
        self.first_key = number << 56

    def __len__(self) -> int:
        return int(self.steps.max(initial=0))

    def stacked(self, step: int, first: int) -> Batch:
        """Step `step` of the first `first` clients: tensors [k, B, ...], scalars [k]."""
        positions = self.positions[:first, step]
        return self._batch(slice(0, first), positions, step)

    def single(self, step: int) -> Batch:
        """Step `step` of a block of one client, without padding and without a leading axis."""
        positions = self.positions[:1, step]
        batch = self._batch(slice(0, 1), positions[:, : int((positions[0] >= 0).sum())], step)
        inputs, targets, mask, lr, index, total, epoch_start, active, weight, _, _ = batch
        return Batch(
            inputs[0], targets[0], mask[0], lr, index, total[0], epoch_start[0], active[0], weight[0]
        )

    def __iter__(self) -> Iterator[Batch]:
        """All batches of a block of one client."""
        return (self.single(step) for step in range(len(self)))

    def _batch(self, rows: slice, positions: Ids, step: int) -> Batch:
        clients = self.clients
        real = positions >= 0
        ids = self.ids[rows]
        keys = None
        if clients.random_transform and self.moving:
            start, width = self.first_key + (step << 32), positions.shape[1]
            words = bits(clients.seed, Purpose.TRANSFORM, self.rounds[rows], ids, width, start=start)
            keys = words.view(np.int64)
        inputs, targets = clients.gather(ids, positions, keys, train=self.moving)
        mask = torch.from_numpy(real).to(clients.device, clients.dtype)
        count = len(ids)
        device = clients.device
        share = real.sum(axis=1) / np.maximum(self.sizes[rows], 1)
        return Batch(
            inputs=inputs,
            targets=targets,
            mask=mask,
            lr=self.lr,
            index=torch.tensor(step, device=device),
            total=torch.from_numpy(self.steps[rows]).to(device),
            epoch_start=torch.from_numpy(step % self.per_epoch[rows] == 0).to(device),
            active=torch.ones(count, dtype=torch.bool, device=device),
            weight=torch.from_numpy(share).to(device, clients.dtype),
        )


class ClientData:
    """All virtual clients' data on one device: one array, an index and offsets.

    Args:
        data: the partitioned data set.
        seed: of the run.
        dtype: of float inputs, that of the model.
        device: where batches are made.
    """

    def __init__(self, data: FederatedData, *, seed: int, dtype: torch.dtype, device: torch.device) -> None:
        self.data = data
        self.seed = seed
        self.dtype = dtype
        self.device = device
        self.inputs = data.dataset.train.inputs.to(device)
        self.targets = data.dataset.train.targets.to(device)
        if self.targets.is_floating_point():
            self.targets = self.targets.to(dtype)
        self.random_transform = data.dataset.transforms.random

    def sizes(self, ids: Ids) -> Ids:
        """[b] examples of each client."""
        return self.data.offsets[ids + 1] - self.data.offsets[ids]

    def steps(self, task: Task, ids: Ids) -> Ids:
        """[b] local steps of each client under this task."""
        limit = None
        if task.steps is not None:
            limit = task.steps[np.searchsorted(task.ids, ids)] if len(task.ids) else task.steps
        return step_counts(self.sizes(ids), task.spec, limit)

    def gather(
        self, ids: Ids, positions: Ids, keys: np.ndarray | None, *, train: bool
    ) -> tuple[Tensor, Tensor]:
        """Inputs [b, B, ...] after the transform and targets [b, B, ...] at each client's positions.

        Padding (-1) repeats the client's first example; its mask is 0.
        """
        data = self.data
        rows = data.index[data.offsets[ids][:, None] + np.maximum(positions, 0)]
        index = torch.from_numpy(rows).to(self.device)
        inputs, targets = self.inputs[index], self.targets[index]
        transforms = data.dataset.transforms
        if train:
            shape = positions.shape
            words = np.zeros(shape, np.int64) if keys is None else keys
            inputs = transforms.train(inputs, torch.from_numpy(words).to(self.device))
        else:
            inputs = transforms.evaluate(inputs)
        if inputs.is_floating_point():
            inputs = inputs.to(self.dtype)
        return inputs, targets

    def anything(self) -> Tensor:
        """[2, ...] inputs of the shape and type that batches have, for trying what a model takes."""
        stored = self.inputs.new_zeros((2, *self.data.dataset.input_shape))
        inputs = self.data.dataset.transforms.evaluate(stored)
        return inputs.to(self.dtype) if inputs.is_floating_point() else inputs

    def gather_flat(
        self, ids: Ids, positions: Ids, keys: np.ndarray | None, order: Ids | None = None
    ) -> tuple[Tensor, Tensor]:
        """Training inputs and targets [R, ...], row r at ``positions[r]`` of client ``ids[r]``.

        The same numbers as `gather`, for rows of any clients in any order.

        Args:
            order: rows of the inputs alone, in another order than the targets; None for all as they are.
        """
        data = self.data
        index = torch.from_numpy(data.index[data.offsets[ids] + np.maximum(positions, 0)]).to(self.device)
        targets = self.targets.index_select(0, index)
        words = np.zeros(len(ids), np.int64) if keys is None else keys
        if order is not None:
            index, words = index[torch.from_numpy(order).to(self.device)], words[order]
        inputs = self.inputs.index_select(0, index)
        inputs = data.dataset.transforms.train(inputs, torch.from_numpy(words).to(self.device))
        if inputs.is_floating_point():
            inputs = inputs.to(self.dtype)
        return inputs, targets
