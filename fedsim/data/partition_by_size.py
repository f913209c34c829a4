"""Partitioners that do not look at labels: equal sizes, skewed sizes, a fixed number with reuse."""

from __future__ import annotations

import numpy as np

from fedsim.data.partition_scheme import (
    Divide,
    Floats,
    Ints,
    above_zero,
    at_least,
    even_sizes,
    log_gamma_draws,
    normalised,
    offsets_of,
    out_of_range,
    proportional_sizes,
)


def _dealt(sizes: Ints, rng: np.random.Generator) -> Ints:
    """[n] client of each example when examples are dealt at random in these sizes."""
    order = rng.permutation(int(sizes.sum()))
    assignment = np.empty(len(order), dtype=np.int64)
    assignment[order] = np.repeat(np.arange(len(sizes), dtype=np.int64), sizes)
    return assignment


def iid() -> Divide:
    """Examples are dealt at random; sizes differ by at most one."""

    def divide(labels: Ints, owners: Ints | None, clients: int, rng: np.random.Generator) -> Ints:
        return _dealt(even_sizes(len(labels), clients), rng)

    return divide


def quantity_skew(*, beta: float) -> Divide:
    """Sizes ~ Dir(beta, …, beta), examples at random: clients differ in quantity only.

    Li, Diao, Chen and He 2022, "Federated learning on non-IID data silos", section IV-C.

    Args:
        beta: > 0; 0.5 is the paper's setting, smaller is more uneven.
    """
    concentration = above_zero("beta", beta)

    def divide(labels: Ints, owners: Ints | None, clients: int, rng: np.random.Generator) -> Ints:
        shares = normalised(log_gamma_draws(concentration, clients, rng))
        return _dealt(proportional_sizes(shares, len(labels)), rng)

    return divide


def quantity_lognormal(*, sigma: float) -> Divide:
    """Sizes proportional to log-normal draws, examples at random.

    The heavy tail that natural federations show: the expected maximum of 1,000 normal draws is
    3.24, so with sigma 1 the largest of 1,000 clients has some 25 times the examples of the median.

    Args:
        sigma: > 0, standard deviation of the logarithm of a client's size.
    """
    deviation = above_zero("sigma", sigma)

    def divide(labels: Ints, owners: Ints | None, clients: int, rng: np.random.Generator) -> Ints:
        logs: Floats = deviation * rng.standard_normal(clients)
        return _dealt(proportional_sizes(normalised(logs), len(labels)), rng)

    return divide


def fixed_size(*, examples: int) -> Divide:
    """Each client owns `examples` different rows; clients may share rows once all are in use.

    Rows are dealt from shuffled decks of the whole data set, so each is owned by the same number of
    clients to within one, and by only one while ``clients * examples`` rows are there. Ten thousand
    clients of eight examples each can so be made of any data set.

    Args:
        examples: 1 … n.

    Raises (when it divides):
        ConfigError: FS-DAT-044, more examples than the data have.
    """
    each = at_least("examples", examples, 1)

    def divide(
        labels: Ints, owners: Ints | None, clients: int, rng: np.random.Generator
    ) -> tuple[Ints, Ints]:
        n = len(labels)
        if each > n:
            raise out_of_range("examples", each, f"at most {n}, the examples in the data")
        total = clients * each
        index = np.empty(total, dtype=np.int64)
        for start in range(0, total, n):
            deck = rng.permutation(n)
            begun = start % each  # rows that the client at the seam took from the deck before
            if begun:
                # Its own rows go to the end, where another client finds them: none is twice its.
                mine = np.zeros(n, dtype=bool)
                mine[index[start - begun : start]] = True
                deck = deck[np.argsort(mine[deck], kind="stable")]
            index[start : start + n] = deck[: total - start]
        return index, offsets_of(np.full(clients, each))

    return divide
