"""The ledger of tasks in hand against a dict of them, and its arrays against one client at a time."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.buffers import no_buffers
from fedsim.local import LocalSpec
from fedsim.outbox import lend_nothing_to
from fedsim.simulation.sent import Chosen, Ledger, Sent, joined
from fedsim.types import Ids, Message, Task

CLIENTS, VERSIONS = 6, 3


def array(values: list[int]) -> Ids:
    return np.array(values, np.int64)


def sent(clients: list[int], version: int = 0, lr: float = 0.1) -> Sent:
    task = Task(
        array(clients),
        version,
        10 + version,
        0,
        Message({"x": torch.zeros(1)}),
        lend_nothing_to,
        no_buffers(),
        LocalSpec(lr=lr),
    )
    own = array(clients)
    return Sent(task, own + 100, own / 2, own < 0)


DISPATCHED = st.tuples(
    st.just("dispatch"),
    st.lists(st.integers(0, CLIENTS - 1), min_size=1, unique=True),
    st.integers(0, VERSIONS - 1),
)
KEYS = st.lists(st.tuples(st.integers(0, CLIENTS), st.integers(0, VERSIONS)), max_size=5)
STEPS = st.lists(
    st.one_of(DISPATCHED, st.tuples(st.sampled_from(["announce", "end", "end announced"]), KEYS, st.just(0))),
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(STEPS, KEYS)
def test_it_holds_what_a_dict_of_tasks_would(
    steps: list[tuple[str, list[object], int]], asked: list[tuple[int, int]]
) -> None:
    ledger, model = Ledger(), {}
    for what, given_to, version in steps:
        if what == "dispatch":
            # A client has at most one task of a version that is not over.
            clients = [c for c in given_to if (c, version) not in model]
            if clients:
                ledger.add(sent(clients, version))
            model |= dict.fromkeys([(c, version) for c in clients], "flying")
            continue
        keys = array(given_to).reshape(-1, 2)
        if what == "announce":
            ledger.announce(keys[:, 0], keys[:, 1])
            model |= {key: "announced" for key in given_to if key in model}
        elif what == "end":
            ledger.end(keys[:, 0], keys[:, 1])
            for key in given_to:
                model.pop(key, None)
        else:
            left = {key for key, status in model.items() if status == "announced"}
            assert set(ledger.end_announced()) == left
            model = {key: status for key, status in model.items() if key not in left}
    assert sorted(ledger) == sorted(model)
    assert len(ledger) == len(model)
    keys = array(asked).reshape(-1, 2)
    chosen = ledger.find(keys[:, 0], keys[:, 1])
    assert chosen.keys == [key for key in asked if key in model]
    assert chosen.steps.tolist() == [100 + client for client, _ in chosen.keys]
    assert chosen.seconds.tolist() == [client / 2 for client, _ in chosen.keys]
    assert chosen.rounds.tolist() == [10 + version for _, version in chosen.keys]
    assert all(ledger.is_announced(key) == (model.get(key) == "announced") for key in asked)
    order = array(list(range(len(chosen)))[::-1])
    turned = chosen.take(order)
    assert turned.keys == chosen.keys[::-1]
    assert joined(chosen, turned).keys == chosen.keys + turned.keys
    assert len(chosen.sents) <= len(ledger.sents)


def test_a_task_whose_rows_are_over_is_not_kept() -> None:
    ledger = Ledger()
    ledger.add(sent([4, 1, 3]))
    ledger.end(array([1, 4]), array([0, 0]))
    assert list(ledger) == [(3, 0)]
    ledger.end(array([3]), array([0]))
    assert not ledger.sents


def test_a_whole_cohort_is_found_without_an_object_for_any_client() -> None:
    ledger = Ledger()
    cohort = sent(list(range(1000)))
    ledger.add(cohort)
    chosen = ledger.find(np.arange(1000), np.zeros(1000, np.int64))
    assert chosen.sents == [cohort]
    assert [type(part) for part in (chosen.which, chosen.rows)] == [np.ndarray, np.ndarray]
    assert (chosen.rows == np.arange(1000)).all()


def test_clients_under_different_training_are_grouped_in_the_order_asked_for() -> None:
    ledger = Ledger()
    for part in (sent([0, 1], 0), sent([2, 3], 1, lr=0.5), sent([4], 2)):
        ledger.add(part)
    chosen: Chosen = ledger.find(array([3, 4, 0, 2]), array([1, 2, 0, 1]))
    assert [group.keys for group in chosen.alike] == [[(3, 1), (2, 1)], [(4, 2), (0, 0)]]
