"""The loop engine: one client at a time by `run_local`, the reference that all others are held to."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor
from torch.utils import _pytree as pytree

from fedsim.keys import Purpose, seed_torch, torch_seed
from fedsim.local import LocalAlgorithm, Phase, run_local
from fedsim.training.clients import Schedule
from fedsim.training.work import (
    Trained,
    Work,
    Workplace,
    buffer_dict,
    client_lent,
    client_message,
    flatten_buffers,
)
from fedsim.types import Ids


class LoopTrainer:
    """Blocks of one client, in cohort order; short batches stay short."""

    name = "loop"
    block = 1

    def __init__(self, place: Workplace) -> None:
        self.place = place

    def plan(self, steps: Ids) -> list[Ids]:
        return [np.array([i], np.int64) for i in range(len(steps))]

    def train(self, work: Work, algorithm: LocalAlgorithm, states: Any) -> Trained:
        place, round_index = self.place, int(work.rounds[0])
        state, optimizer_state = pytree.tree_map(lambda leaf: leaf[0], states)
        lent = pytree.tree_map(lambda leaf: leaf[0], client_lent(work.lent, place.spec))
        seed_torch(torch_seed(place.seed, Purpose.DROPOUT, round_index, int(work.ids[0])))
        outcome = run_local(
            algorithm,
            client_message(work.message, place.spec),
            lent,
            state,
            lambda phase, spec: Schedule(
                place.clients,
                work.ids,
                work.rounds,
                work.steps,
                phases=algorithm.phases,
                number=_number(algorithm, phase),
                spec=spec,
            ),
            spec=work.spec,
            buffers=buffer_dict(place, work.buffers),
            optimizer_state=optimizer_state or None,
        )

        def row(value: Tensor) -> Tensor:
            return value.detach().unsqueeze(0)

        kept = outcome.optimizer_state if algorithm.keeps_optimizer else ()
        return Trained(
            {n: row(place.spec.flatten(v)) for n, v in outcome.result.vectors.items()},
            {n: row(v.double()) for n, v in outcome.result.scalars.items()},
            pytree.tree_map(row, (outcome.client_state, kept)),
            outcome.normaliser.double().reshape(1).cpu().numpy(),
            {
                "loss": outcome.loss.double().reshape(1).cpu().numpy(),
                **{n: v.double().reshape(1).cpu().numpy() for n, v in outcome.metrics.items()},
            },
            flatten_buffers(place.floating, outcome.buffers, stacked=False),
            flatten_buffers(place.integers, outcome.buffers, stacked=False),
            np.array([outcome.steps], np.int64),
        )


def _number(algorithm: LocalAlgorithm, phase: Phase) -> int:
    return next(i for i, candidate in enumerate(algorithm.phases) if candidate is phase)
