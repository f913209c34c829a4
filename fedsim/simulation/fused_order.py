"""The clients of a block in another order, and what they come back with in theirs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fedsim.training.work import Trained, Work
from fedsim.types import Ids


def permuted(work: Work, states: Any, order: Ids) -> tuple[Work, Any]:
    """The clients in another order."""
    index = torch.from_numpy(order)

    def rows(tree: Any) -> Any:
        return pytree.tree_map(lambda leaf: leaf[index.to(leaf.device)], tree)

    message = rows(work.message) if work.mixed else work.message
    moved = replace(
        work,
        ids=work.ids[order],
        steps=work.steps[order],
        rounds=work.rounds[order],
        message=message,
        lent=rows(work.lent),
        weights=None if work.weights is None else work.weights[order],
    )
    return moved, rows(states)


def restored(trained: Trained, order: Ids) -> Trained:
    """What the clients came back with, in another order."""
    index = torch.from_numpy(order)

    def rows(tree: Any) -> Any:
        return pytree.tree_map(lambda leaf: leaf[index.to(leaf.device)], tree)

    summed = trained.summed
    if summed is not None:
        norms = None if summed.norms is None else summed.norms[order]
        summed = summed._replace(weights=summed.weights[order], norms=norms)
    return trained._replace(
        summed=summed,
        vectors=rows(trained.vectors),
        scalars=rows(trained.scalars),
        states=rows(trained.states),
        normaliser=trained.normaliser[order],
        metrics={name: values[order] for name, values in trained.metrics.items()},
        steps=trained.steps[order],
    )
