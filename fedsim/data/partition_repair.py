"""What happens after the division: short clients are filled or dropped, hold-outs are set aside.

The rule of filling: while a client is short of ``min_examples``, the client that is largest at that
moment gives one of its examples, drawn at random. Evaluated at once, the largest clients are cut
down to a common level. What is given is dealt out donor by donor, so a filled client gets most of
its examples from one or two donors and their skew with them. Nothing is redrawn: what the other
clients own stays what the partitioner made it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedsim.data.partition_scheme import Ints, grouped, offsets_of


@dataclass(frozen=True, slots=True)
class Filled:
    """A repaired division and how much was moved."""

    index: Ints
    offsets: Ints
    moved: int
    clients: int  # how many were filled


def too_few(sizes: Ints, min_examples: int, *, keep_empty: bool) -> np.ndarray:
    """[N] bool, the clients that must be filled or dropped."""
    short = sizes < min_examples
    return short & (sizes > 0) if keep_empty else short


def missing_examples(sizes: Ints, min_examples: int, *, keep_empty: bool) -> int:
    """How many examples are lacking in all for the rule to be possible; 0 if it is."""
    concerned = int((sizes > 0).sum()) if keep_empty else len(sizes)
    return max(0, concerned * min_examples - int(sizes.sum()))


def fill_short_clients(
    index: Ints,
    offsets: Ints,
    *,
    min_examples: int,
    keep_empty: bool,
    rng: np.random.Generator,
) -> Filled:
    """Give every short client examples of the largest ones until it has `min_examples`.

    Rows must not be shared between clients, and `missing_examples` must be 0.

    Args:
        keep_empty: clients without any example stay as they are.
    """
    sizes = np.diff(offsets)
    short = np.flatnonzero(too_few(sizes, min_examples, keep_empty=keep_empty))
    if len(short) == 0:
        return Filled(index, offsets, 0, 0)
    need = min_examples - sizes[short]
    given = _water_level(sizes, int(need.sum()), floor=min_examples)
    owner = np.repeat(np.arange(len(sizes), dtype=np.int64), sizes)
    # Random order within each client; a donor gives the first of its rows in that order.
    shuffled = np.lexsort((rng.random(len(index)), owner))
    rank = np.arange(len(index)) - np.repeat(offsets[:-1], sizes)
    leaving = shuffled[rank < np.repeat(given, sizes)]
    owner[leaving] = np.repeat(short, need)
    order, new_offsets = grouped(owner, len(sizes))
    return Filled(index[order], new_offsets, len(leaving), len(short))


def _water_level(sizes: Ints, total: int, *, floor: int) -> Ints:
    """[N] how much each client gives when the largest gives one, `total` times; none below `floor`.

    The level is the largest at which what stands above it is enough.
    """
    low, high = floor, int(sizes.max())
    while low < high:
        middle = (low + high + 1) // 2
        if int(np.maximum(sizes - middle, 0).sum()) >= total:
            low = middle
        else:
            high = middle - 1
    given = np.maximum(sizes - low, 0)
    surplus = int(given.sum()) - total
    # Fewer than there are donors, or the level would be one higher; the last donors give one less.
    given[np.flatnonzero(given)[len(np.flatnonzero(given)) - surplus :]] -= 1
    return given


def without_clients(index: Ints, offsets: Ints, kept: Ints) -> tuple[Ints, Ints]:
    """``(index, offsets)`` of the clients `kept`, in that order."""
    sizes = np.diff(offsets)[kept]
    starts = np.repeat(offsets[:-1][kept], sizes)
    new_offsets = offsets_of(sizes)
    within = np.arange(int(sizes.sum())) - np.repeat(new_offsets[:-1], sizes)
    return index[starts + within], new_offsets


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Training examples, and those each client keeps back for its own evaluation."""

    index: Ints
    offsets: Ints
    holdout_index: Ints
    holdout_offsets: Ints


def hold_out(
    index: Ints,
    offsets: Ints,
    *,
    fraction: float,
    min_examples: int,
    rng: np.random.Generator,
) -> HeldOut:
    """Set aside ``floor(fraction * size)`` random examples of each client.

    Never so many that fewer than `min_examples` (and at least one) remain for training: a client
    with a single example has no hold-out. Both parts keep the order of `index`.
    """
    if not fraction:  # nothing to draw, which for a million clients takes seconds
        return HeldOut(index, offsets, np.zeros(0, np.int64), np.zeros_like(offsets))
    sizes = np.diff(offsets)
    spare = np.maximum(sizes - max(min_examples, 1), 0)
    held = np.minimum(np.floor(fraction * sizes).astype(np.int64), spare)
    owner = np.repeat(np.arange(len(sizes), dtype=np.int64), sizes)
    shuffled = np.lexsort((rng.random(len(index)), owner))
    rank = np.arange(len(index)) - np.repeat(offsets[:-1], sizes)
    out = np.zeros(len(index), dtype=bool)
    out[shuffled[rank < np.repeat(held, sizes)]] = True
    return HeldOut(index[~out], offsets_of(sizes - held), index[out], offsets_of(held))
