"""Transforms: what changes an update on its way from client to server.

Clipping, compression, noise and the defences against inversion are of this kind: a client half and a
server half, both pure, state in and state out. Client-side state follows the rule of client states
(kept only once the update was accepted); server-side state is part of the run's state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from fedsim.types import UpdateBlock, WindowInfo

Vectors = Mapping[str, Tensor]
Keys = Any  # uint64 [b], one stream key per client


class UpdateTransform(NamedTuple):
    """One transform (Any: its own state and message types).

    Args:
        init: (vectors {name: [b, D]} of zeros) -> client-side state with a leading b, or ().
        encode: (state, vectors {name: [b, D]}, keys) -> message, state; on the client.
        decode: (message) -> vectors; on the server.
        linear: encoded messages may be summed before decoding.
        decode_sum: (summed message) -> vectors, for linear transforms.
        init_server: () -> server-side state.
        after_reduce: (server state, reduced, info, seed) -> server state, reduced; where central
            noise is added.
        downlink: (encode, decode) for the broadcast's vectors.
    """

    init: Callable[[Vectors], Any]
    encode: Callable[[Any, Vectors, Keys], tuple[Any, Any]]
    decode: Callable[[Any], Vectors]
    linear: bool = False
    decode_sum: Callable[[Any], Vectors] | None = None
    init_server: Callable[[], Any] | None = None
    after_reduce: Callable[[Any, Any, WindowInfo, int], tuple[Any, Any]] | None = None
    downlink: tuple[Callable[[Vectors], Any], Callable[[Any], Vectors]] | None = None


def identity() -> UpdateTransform:
    """Changes nothing; bit-identical to no transform."""
    return UpdateTransform(lambda v: (), lambda s, v, k: (v, s), lambda m: m, linear=True)


def chain(*transforms: UpdateTransform) -> UpdateTransform:
    """Encode left to right, decode right to left; the state is the tuple of the parts' states.

    Each part sees the vectors that the parts before it would decode to, so a message is what the
    last one makes.
    """
    if len(transforms) == 1:
        return transforms[0]

    def init(vectors: Vectors) -> Any:
        return tuple(t.init(vectors) for t in transforms)

    def encode(states: Any, vectors: Vectors, keys: Keys) -> tuple[Any, Any]:
        message: Any = vectors
        kept = []
        for transform, state in zip(transforms, states, strict=True):
            message, state = transform.encode(state, message, keys)
            kept.append(state)
        return message, tuple(kept)

    def decode(message: Any) -> Vectors:
        for transform in reversed(transforms):
            message = transform.decode(message)
        vectors: Vectors = message
        return vectors

    def init_server() -> Any:
        return tuple(t.init_server() if t.init_server else () for t in transforms)

    def after_reduce(states: Any, reduced: Any, info: WindowInfo, seed: int) -> tuple[Any, Any]:
        kept = []
        for transform, state in zip(transforms, states, strict=True):
            if transform.after_reduce is not None:
                state, reduced = transform.after_reduce(state, reduced, info, seed)
            kept.append(state)
        return tuple(kept), reduced

    return UpdateTransform(
        init,
        encode,
        decode,
        linear=all(t.linear for t in transforms),
        init_server=init_server,
        after_reduce=after_reduce,
        downlink=_chain_downlinks([t.downlink for t in transforms if t.downlink is not None]),
    )


Downlink = tuple[Callable[[Vectors], Any], Callable[[Any], Vectors]]


def _chain_downlinks(pairs: Sequence[Downlink]) -> Downlink | None:
    if not pairs:
        return None

    def encode(vectors: Vectors) -> Any:
        message: Any = vectors
        for down, _ in pairs:
            message = down(message)
        return message

    def decode(message: Any) -> Vectors:
        for _, up in reversed(pairs):
            message = up(message)
        vectors: Vectors = message
        return vectors

    return encode, decode


Observer = Callable[["Observed"], None]


class Observed(NamedTuple):
    """What a curious server sees of one block: the broadcast and the decoded updates."""

    round_index: int
    version: int
    message: Any
    block: UpdateBlock
