"""What a block of clients answers to a task: states read, training, transform, and what they will keep.

Client states are named rows: ``local-000`` … the leaves of the algorithm's state and of the optimiser's
where the algorithm keeps it, ``transform-000`` … those of the transform.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fedsim.folding import row_norms
from fedsim.keys import Purpose, stream_keys
from fedsim.local import LocalAlgorithm
from fedsim.optimizers import make_optimizer
from fedsim.strategy import weighted_sum
from fedsim.training.work import Trained, Trainer, Work, Workplace, client_lent, client_message
from fedsim.transform import UpdateTransform
from fedsim.types import Bools, Ids, Message, Summed

_LARGE = 1 << 22
"""Values above which tensors without memory are worth the second that their first use costs."""

Known = Callable[[Ids], tuple[Bools, Mapping[str, Tensor]]]
"""[C] clients -> which of them have states [C], and the rows {name: [k, *shape]} of those k."""


class Answer(NamedTuple):
    """Of C clients.

    Args:
        trained: as the trainer left it.
        vectors: {name: [C, D]} as they are sent, or what the transform made of them; without "delta" where
            `trained` holds its sum.
        kept: {name: [C, *shape]} what each client keeps once its answer has counted.
    """

    trained: Trained
    vectors: Any
    kept: Mapping[str, Tensor]


def answer(
    place: Workplace,
    trainer: Trainer,
    transform: UpdateTransform | None,
    work: Work,
    algorithm: LocalAlgorithm,
    known: Known,
) -> Answer:
    """Train the clients of `work` from what is `known` of them.

    Raises:
        ClientFailed: the training of a client raised.
    """
    with torch.no_grad():
        held = known(work.ids)
        states = _filled(_fresh(place, work, algorithm), "local", *held)
        trained = _added_up(work, trainer.train(work, algorithm, states))
        vectors: Any = trained.vectors
        kept: Any = ()
        if transform is not None:
            zeros = {name: torch.zeros_like(v[:1]) for name, v in trained.vectors.items()}
            fresh = pytree.tree_map(lambda leaf: _repeated(leaf[0], len(work.ids)), transform.init(zeros))
            keys = stream_keys(place.seed, Purpose.ENCODE, work.rounds, work.ids)
            vectors, kept = transform.encode(_filled(fresh, "transform", *held), trained.vectors, keys)
    return Answer(trained, vectors, _named(trained.states, "local") | _named(kept, "transform"))


def _added_up(work: Work, trained: Trained) -> Trained:
    """The sum of the updates instead of their rows, where that is wanted and less than they are."""
    rows = trained.vectors.get("delta")
    if work.weights is None or rows is None or len(rows) < 2:
        return trained
    if trained.examples is not None or not np.array_equal(trained.steps, work.steps):
        return trained  # the clients say themselves how they are to be weighed
    norms, finite = row_norms(rows)
    if not finite.all():
        return trained  # whoever refuses some of them needs the others
    others = {name: value for name, value in trained.vectors.items() if name != "delta"}
    summed = Summed(work.weights, weighted_sum(work.weights, rows), norms)
    return trained._replace(vectors=others, summed=summed)


def from_rows(state: Any, rows: Mapping[str, Tensor]) -> Any:
    """The algorithm's state of one client out of its rows [1, *shape]; `state` gives the structure."""
    leaves, structure = pytree.tree_flatten(state)
    own = [rows[f"local-{position:03d}"][0] for position in range(len(leaves))]
    return pytree.tree_unflatten(own, structure)


def _fresh(place: Workplace, work: Work, algorithm: LocalAlgorithm) -> Any:
    """[C] states at first participation: the algorithm's and the optimiser's."""

    def fresh(message: Message) -> Any:
        seen = client_message(message, place.spec)
        optimizer: Any = make_optimizer(work.spec).init(seen.x) if algorithm.keeps_optimizer else ()
        return algorithm.fresh(seen), optimizer

    if not work.mixed:
        one = fresh(work.message)
        return pytree.tree_map(lambda leaf: _repeated(leaf, len(work.ids)), one)
    each = [
        fresh(pytree.tree_map(lambda leaf, row=row: leaf[row], work.message)) for row in range(len(work.ids))
    ]
    return pytree.tree_map(lambda *leaves: torch.stack(leaves), *each)


def _filled(fresh: Any, part: str, known: Bools, rows: Mapping[str, Tensor]) -> Any:
    """States with a leading C: what is known of a client, fresh for those never accepted before."""
    stacked, structure = pytree.tree_flatten(fresh)
    if stacked and known.any():
        at = torch.from_numpy(np.flatnonzero(known))
        for position, leaf in enumerate(stacked):
            leaf[at.to(leaf.device)] = rows[f"{part}-{position:03d}"].to(leaf.device)
    return pytree.tree_unflatten(stacked, structure)


def _repeated(leaf: Tensor, clients: int) -> Tensor:
    """[C, ...] copies."""
    return leaf.unsqueeze(0).repeat(clients, *[1] * leaf.ndim)


def _named(tree: Any, part: str) -> dict[str, Tensor]:
    """The leaves of a state as named rows."""
    return {f"{part}-{i:03d}": leaf for i, leaf in enumerate(pytree.tree_leaves(tree))}


def prepare_reported(place: Workplace) -> None:
    """What `reported` needs of torch, loaded before a run begins: a second and some 70 MB.

    Only for large models, where it is used.
    """
    if place.spec.size > _LARGE:
        torch.empty(1, device="meta").neg()


def reported(
    place: Workplace, algorithm: LocalAlgorithm, message: Message, lent: Any
) -> tuple[dict[str, int], tuple[str, ...]]:
    """What every answer to a message holds, found without any data, and without memory for large tensors.

    Args:
        message: flat; lent: one client's rows, leading 1, or ().

    Returns:
        Names and lengths of the reported vectors, and names of the scalars.
    """
    held_message, held = message, lent
    normaliser = torch.ones(())
    if place.spec.size > _LARGE:
        held_message, held = pytree.tree_map(lambda leaf: leaf.to("meta"), (message, lent))
        normaliser = normaliser.to("meta")
    msg = client_message(Message(*held_message), place.spec)
    rows = pytree.tree_map(lambda leaf: leaf[0], client_lent(held, place.spec))
    state = algorithm.fresh(msg)
    x, carry = algorithm.init(msg, rows, state)
    result, _, _ = algorithm.finish(msg, rows, state, x, carry, normaliser)
    sizes = {name: place.spec.flatten(vector).numel() for name, vector in result.vectors.items()}
    return sizes, tuple(result.scalars)
