"""The loop driver of opaque clients: a user's own training function, one client at a time."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch

from fedsim.buffers import Buffers
from fedsim.flat import flat_buffers, flat_of, write_flat
from fedsim.keys import Purpose, seed_torch, torch_seed
from fedsim.local import LocalAlgorithm
from fedsim.opaque_client import LocalData, LocalTask, OpaqueClient, Result
from fedsim.training.work import ClientFailed, Trained, Work, Workplace, buffer_dict
from fedsim.types import Ids


class OpaqueTrainer:
    """Blocks of one client, each on a module that is written anew for it.

    An exception of the training function is this client's failure, not the run's.
    """

    name = "loop"
    block = 1

    def __init__(self, place: Workplace, client: OpaqueClient) -> None:
        self.place = place
        self.client = client
        self.scratch = copy.deepcopy(place.module)

    def plan(self, steps: Ids) -> list[Ids]:
        return [np.array([i], np.int64) for i in range(len(steps))]

    def train(self, work: Work, algorithm: LocalAlgorithm, states: Any) -> Trained:
        place, ids, round_index = self.place, work.ids, int(work.rounds[0])
        client = int(ids[0])
        x = work.message.vectors["x"]
        self._reset(x, work.buffers)
        positions = np.arange(int(place.clients.sizes(ids)[0]))[None, :]
        inputs, targets = place.clients.gather(ids, positions, None, train=False)
        seed = torch_seed(place.seed, Purpose.BATCH, round_index, client)
        seed_torch(torch_seed(place.seed, Purpose.DROPOUT, round_index, client))
        try:
            with torch.enable_grad():
                result = self.client.train(
                    self.scratch,
                    LocalData(inputs[0], targets[0]),
                    LocalTask(client, round_index, seed, work.spec),
                )
        except Exception as error:
            raise ClientFailed(client, f"{type(error).__name__}: {error}") from error
        if not isinstance(result, Result):
            raise ClientFailed(
                client, f"the training function returned {type(result).__name__}, not fedsim.Result"
            )
        delta = flat_of(result.model, place.spec) - x
        metrics = {n: np.array([float(v)]) for n, v in result.metrics.items()}
        floating = flat_buffers(result.model, place.floating)
        integers = flat_buffers(result.model, place.integers)
        return Trained(
            {"delta": delta.unsqueeze(0)},
            {},
            states,
            np.array([np.nan]),
            metrics,
            None if floating is None else floating.unsqueeze(0),
            None if integers is None else integers.unsqueeze(0),
            work.steps,
            None if result.examples is None else np.array([result.examples], np.int64),
        )

    def _reset(self, x: torch.Tensor, buffers: Buffers) -> None:
        write_flat(self.scratch, self.place.spec, x)
        self.scratch.zero_grad(set_to_none=True)  # of the client before, where its function left some
        named = dict(self.scratch.named_buffers())
        for name, value in buffer_dict(self.place, buffers).items():
            named[name].copy_(value)
        self.scratch.train()
