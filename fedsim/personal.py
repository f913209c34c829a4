"""Personal parameters: parts of a model that stay on the client, under any algorithm.

Arivazhagan et al. 2019, "Federated learning with personalization layers" (FedPer): the named
parameters are trained with the rest but never averaged; each client keeps its own between rounds.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fedsim.local import LocalAlgorithm, Result
from fedsim.types import Message
from fedsim.vector import Vector


class PersonalState(NamedTuple):
    """The wrapped algorithm's state, and the client's own values of the personal parameters."""

    inner: Any
    own: Vector


def personalise(algorithm: LocalAlgorithm, names: frozenset[str]) -> LocalAlgorithm:
    """`algorithm` with the parameters `names` kept on the client.

    The algorithm sees a broadcast model with the client's own values in place, so that a proximal
    term pulls towards where this task started. Every vector that it reports, and every one that it
    keeps (duals, control variates), is zero at the personal entries: no server sees or moves them,
    and nothing accumulates against them.
    """

    def seen(msg: Message, own: Vector) -> Message:
        return Message({**msg.vectors, "x": merge(msg.x, own)}, msg.scalars)

    def merge(x: Vector, own: Vector) -> Vector:
        return Vector({n: own.tensors[n] if n in names else t for n, t in x.tensors.items()})

    def hide(leaf: Any) -> Any:
        if not isinstance(leaf, Vector):
            return leaf
        return Vector({n: torch.zeros_like(t) if n in names else t for n, t in leaf.tensors.items()})

    def fresh(msg: Message) -> PersonalState:
        own = Vector({n: t for n, t in msg.x.tensors.items() if n in names})
        return PersonalState(algorithm.fresh(msg), own)

    def init(msg: Message, lent: Any, state: PersonalState) -> tuple[Vector, Any]:
        x, carry = algorithm.init(seen(msg, state.own), lent, state.inner)
        return merge(x, state.own), carry

    def phase_direction(direction: Any) -> Any:
        def inner(msg: Message, lent: Any, state: PersonalState, *rest: Any) -> Any:
            return direction(seen(msg, state.own), lent, state.inner, *rest)

        return inner

    def finish(
        msg: Message, lent: Any, state: PersonalState, x: Vector, carry: Any, normaliser: Tensor
    ) -> tuple[Result, PersonalState, Any]:
        result, kept, metrics = algorithm.finish(
            seen(msg, state.own), lent, state.inner, x, carry, normaliser
        )
        kept = pytree.tree_map(hide, kept, is_leaf=lambda leaf: isinstance(leaf, Vector))
        own = Vector({n: x.tensors[n] for n in state.own.tensors})
        hidden = {name: hide(v) for name, v in result.vectors.items()}
        return Result(hidden, result.scalars), PersonalState(kept, own), metrics

    def personal(msg: Message, state: PersonalState) -> Vector:
        view = seen(msg, state.own)
        base = view.x if algorithm.personal is None else algorithm.personal(view, state.inner)
        return merge(base, state.own)

    return algorithm._replace(
        fresh=fresh,
        init=init,
        phases=tuple(p._replace(direction=phase_direction(p.direction)) for p in algorithm.phases),
        finish=finish,
        personal=personal,
        terms=None,
    )
