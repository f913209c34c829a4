"""Partitioners that skew the labels: which classes a client sees.

Two conventions share the name "Dirichlet partition" and give different federations for the same
alpha, so they are two partitioners here:

====================  ===============================  ============================================
name                  what is drawn                    used by
====================  ===============================  ============================================
``dirichlet``         for every **class** its shares   Yurochkin et al. 2019; Li et al. 2022
                      over the clients; sizes vary     (NIID-Bench); flwr-datasets
``dirichlet_client``  for every **client** its mix of  Hsu et al. 2019; Acar et al. 2021 (FedDyn)
                      classes; sizes are equal         and codes built on theirs
====================  ===============================  ============================================
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedsim.data.partition_scheme import (
    UNASSIGNED,
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


@dataclass(frozen=True, slots=True)
class _Classes:
    """Examples in random order within each class: class k is ``order[starts[k]:starts[k + 1]]``."""

    order: Ints  # [n]
    starts: Ints  # [K + 1]

    @property
    def count(self) -> int:
        return len(self.starts) - 1

    @property
    def sizes(self) -> Ints:
        return np.diff(self.starts)


def _by_class(labels: Ints, rng: np.random.Generator) -> _Classes:
    """Only classes that occur are counted, so absent label values cost nothing."""
    _, compact = np.unique(labels, return_inverse=True)
    shuffled = rng.permutation(len(labels))
    order = shuffled[np.argsort(compact[shuffled], kind="stable")]
    return _Classes(order.astype(np.int64, copy=False), offsets_of(np.bincount(compact)))


def dirichlet(*, alpha: float) -> Divide:
    """By class: each class is cut among all clients in proportions ~ Dir(alpha, …, alpha).

    Yurochkin et al. 2019, "Bayesian nonparametric federated learning of neural networks", section 4
    (``p_k ~ Dir_J(alpha)``). Every example has exactly one client; clients differ in size as well
    as in classes, and a small alpha leaves some without any (see ``min_examples``).

    Args:
        alpha: > 0; 0.1 is strong skew, 100 is close to IID.

    Departs from the authors' code: no redrawing until every client has ten examples and no capping
    of clients that are already large; short clients are filled afterwards instead.
    """
    concentration = above_zero("alpha", alpha)

    def divide(labels: Ints, owners: Ints | None, clients: int, rng: np.random.Generator) -> Ints:
        classes = _by_class(labels, rng)
        assignment = np.empty(len(labels), dtype=np.int64)
        everyone = np.arange(clients, dtype=np.int64)
        # One class at a time: the draws need [N] memory, not [K, N].
        for start, stop in zip(classes.starts[:-1], classes.starts[1:], strict=True):
            shares = normalised(log_gamma_draws(concentration, clients, rng))
            counts = proportional_sizes(shares, int(stop - start))
            assignment[classes.order[start:stop]] = np.repeat(everyone, counts)
        return assignment

    return divide


def dirichlet_client(*, alpha: float) -> Divide:
    """By client: each client draws its own mix of classes ~ Dir(alpha, …, alpha); sizes are equal.

    Hsu, Qi and Brown 2019, "Measuring the effects of non-identical data distribution for federated
    visual classification", section 3, with the finite pools of the FedDyn authors' simulator (Acar
    et al. 2021): a client asks for a class of its mix, a class that has run out is asked for no
    more, and all examples find a client.

    Args:
        alpha: > 0, the concentration of **each** class. Hsu et al. write Dir(α p) with the K class
            frequencies p summing to 1, so their α is K times this alpha for balanced classes.

    The examples that are handed out last come from whatever classes are left, so a few clients are
    less skewed than their draw; that is a property of the method with finite pools.
    """
    concentration = above_zero("alpha", alpha)

    def divide(labels: Ints, owners: Ints | None, clients: int, rng: np.random.Generator) -> Ints:
        classes = _by_class(labels, rng)
        logs = log_gamma_draws(concentration, (clients, classes.count), rng)
        # One slot per example, in random order, so that no client is systematically served last.
        slots = np.repeat(np.arange(clients, dtype=np.int64), even_sizes(len(labels), clients))
        waiting = rng.permutation(slots)
        assignment = np.full(len(labels), UNASSIGNED, dtype=np.int64)
        taken = classes.starts[:-1].copy()  # [K] next free place of each class
        while len(waiting):
            left = classes.starts[1:] - taken
            wish = _draw_classes(logs, waiting, left > 0, rng)
            # First come, first served within each class.
            queue = np.argsort(wish, kind="stable")
            applicants = np.bincount(wish, minlength=classes.count)
            place = np.arange(len(queue)) - np.repeat(offsets_of(applicants)[:-1], applicants)
            served = place < np.repeat(left, applicants)
            winners = queue[served]
            spots = classes.order[(taken[wish[queue]] + place)[served]]
            assignment[spots] = waiting[winners]
            taken += np.minimum(applicants, left)
            # A class ran out whenever somebody was refused: at most K passes.
            waiting = np.delete(waiting, winners)
        return assignment

    return divide


def _draw_classes(logs: Floats, clients: Ints, available: np.ndarray, rng: np.random.Generator) -> Ints:
    """[m] one class for each entry of `clients`, from its mix restricted to available classes."""
    asking, row = np.unique(clients, return_inverse=True)
    open_classes = np.flatnonzero(available)
    mix = normalised(logs[np.ix_(asking, open_classes)])
    cumulative = np.cumsum(mix, axis=1)
    cumulative[:, -1] = 1.0
    # All rows in one sorted array, row i shifted by i: one search instead of one per client.
    ladder = (cumulative + np.arange(len(asking))[:, None]).ravel()
    found = np.searchsorted(ladder, row + rng.random(len(clients)), side="right")
    column = np.clip(found - row * len(open_classes), 0, len(open_classes) - 1)
    return np.asarray(open_classes[column], dtype=np.int64)


def shards(*, shards_per_client: int = 2) -> Divide:
    """Examples sorted by label are cut into equal shards; each client is dealt some at random.

    McMahan et al. 2017, "Communication-efficient learning of deep networks from decentralized
    data", section 3 (the "pathological non-IID" MNIST split: 200 shards, two for each client).

    Args:
        shards_per_client: >= 1.
    """
    each = at_least("shards_per_client", shards_per_client, 1)

    def divide(labels: Ints, owners: Ints | None, clients: int, rng: np.random.Generator) -> Ints:
        order = _by_class(labels, rng).order
        dealt = rng.permutation(np.repeat(np.arange(clients, dtype=np.int64), each))
        assignment = np.empty(len(labels), dtype=np.int64)
        assignment[order] = np.repeat(dealt, even_sizes(len(labels), clients * each))
        return assignment

    return divide


def pathological(*, classes_per_client: int = 2) -> Divide:
    """Each client owns `classes_per_client` classes; a class is divided evenly among its owners.

    The split by quantity of labels, ``#C = k``, of Li et al. 2022, "Federated learning on non-IID
    data silos", section IV-A. Classes are dealt from shuffled decks, so that each has the same
    number of owners to within one and none is left out.

    Args:
        classes_per_client: k, 1 … K.

    Raises (when it divides):
        ConfigError: FS-DAT-044, more than K classes, or so few clients that some class has none.
    """
    each = at_least("classes_per_client", classes_per_client, 1)

    def divide(labels: Ints, owners: Ints | None, clients: int, rng: np.random.Generator) -> Ints:
        classes = _by_class(labels, rng)
        if each > classes.count:
            raise out_of_range(
                "classes_per_client", each, f"at most {classes.count}, the classes in the data"
            )
        if clients * each < classes.count:
            raise out_of_range(
                "classes_per_client",
                each,
                f"at least {-(-classes.count // clients)}, or some of the {classes.count} classes "
                f"would have no client among {clients}",
            )
        holders = _deal(classes.count, clients, each, rng)
        assignment = np.empty(len(labels), dtype=np.int64)
        for k, (start, stop) in enumerate(zip(classes.starts[:-1], classes.starts[1:], strict=True)):
            sharing = rng.permutation(np.flatnonzero((holders == k).any(axis=1)))
            counts = even_sizes(int(stop - start), len(sharing))
            assignment[classes.order[start:stop]] = np.repeat(sharing, counts)
        return assignment

    return divide


def _deal(classes: int, clients: int, each: int, rng: np.random.Generator) -> Ints:
    """[N, each] distinct classes for each client, every class equally often to within one.

    Client j of a block takes `each` consecutive cards of the repeated deck. A block ends where the
    end of a deck meets the end of a hand; until then a hand that spans two decks has no duplicate
    because both are in the same order.
    """
    block = classes // np.gcd(classes, each)  # clients until the two ends meet
    decks = -(-clients // block)
    order = rng.permuted(np.tile(np.arange(classes), (decks, 1)), axis=1)
    client = np.arange(clients)
    position = (client % block)[:, None] * each + np.arange(each)
    hands = order[(client // block)[:, None], position % classes]
    return rng.permutation(hands, axis=0).astype(np.int64, copy=False)
