"""What comes at an awkward moment of a run: nodes while it begins, a stop while it ends."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedsim.config import load_config
from fedsim.identity import Key
from fedsim.pb import federation_pb2 as pb
from fedsim.server import runs
from fedsim.server.run_thread import NO_SPACE, RunThread
from fedsim.simulation.replay import Replay, read_journal
from tests.fleet import Coordinator, make_nodes, toml_of
from tests.wired import config

N = 4


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    made = Coordinator(tmp_path / "state", Key.new(), make_nodes(tmp_path, N)).start()
    yield made
    made.stop()


def submit(coordinator: Coordinator, **deployment: Any) -> str:
    values = config("fedavg", deployment={"min_clients": N, **deployment})
    values["output"] = {"report": False, "plots": False}
    return coordinator.runs.submit(toml_of(values), "run", "", "").run_id


def while_it_begins(monkeypatch: pytest.MonkeyPatch, event: Callable[[], None]) -> None:
    """Let `event` happen when a run knows its nodes as they were, and is in no list yet."""
    plain = runs.Planner

    def planner(*values: Any, **options: Any) -> Any:
        event()
        return plain(*values, **options)

    monkeypatch.setattr(runs, "Planner", planner)


def test_nodes_that_come_while_a_run_begins_are_there_for_it(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    everybody = frozenset(node.node_id for node in coordinator.nodes)
    coordinator.runs.set_online(frozenset())
    while_it_begins(monkeypatch, lambda: coordinator.runs.set_online(everybody))
    assert coordinator.serve(submit(coordinator, wait=5.0)) == "ok"


def test_a_node_that_is_revoked_while_a_run_begins_is_not_asked(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, *others = [node.node_id for node in coordinator.nodes]
    while_it_begins(monkeypatch, lambda: coordinator.runs.revoke(gone))
    run_id = submit(coordinator, min_clients=N - 1)
    coordinator.serve(run_id, until=lambda: any(map(coordinator.runs.offer, others)))
    assert coordinator.runs.offer(gone) is None
    assert coordinator.runs.get(run_id).online == N - 1


def test_an_answer_does_not_count_whose_node_is_revoked_while_the_run_pauses(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = submit(coordinator)
    thread = coordinator.runs._threads[run_id]
    nodes = [node.node_id for node in coordinator.nodes]
    coordinator.serve(run_id, until=lambda: all(map(coordinator.runs.offer, nodes)))
    tasks = list(map(coordinator.runs.offer, nodes))
    monkeypatch.setattr(thread.engine, "deliver", lambda entries: None)  # in the ledger, and no further
    for node, task in list(zip(coordinator.nodes, tasks, strict=True))[:2]:
        assert task is not None
        decision = coordinator.turn(node, task)
        assert decision is not None
        assert decision.verdict == pb.ACCEPTED
    thread.halt("paused")
    thread.join()
    coordinator.runs.revoke(coordinator.nodes[0].node_id)
    coordinator.runs.resume(run_id)
    coordinator.serve(run_id, until=lambda: coordinator.runs.get(run_id).rounds_done >= 1)
    coordinator.runs.stop(run_id, True)
    metrics = (coordinator.runs.folder(run_id) / "metrics.jsonl").read_text().splitlines()
    record = json.loads(metrics[1])
    assert (record["received"], record["refused"]) == (N - 1, 1)


def test_a_stop_that_comes_while_the_run_ends_is_not_its_last_word(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = submit(coordinator)
    plain = RunThread.end_after_round

    def slowly(thread: RunThread, state: str, detail: str = "") -> None:
        plain(thread, state, detail)
        coordinator.serve(run_id)  # meanwhile the open round is completed, and the run is over
        thread.join()

    monkeypatch.setattr(RunThread, "end_after_round", slowly)
    assert coordinator.runs.stop(run_id, False).state == "stopped"
    states = [event.data for event in coordinator.runs.events(run_id, 0) if event.type == "state"]
    assert '"stopped"' in states[-1]


@pytest.mark.parametrize("now", [True, False])
def test_a_stop_that_comes_while_the_run_pauses_is_a_stop(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch, now: bool
) -> None:
    """It would go on by itself as soon as the disk has room again."""
    run_id = submit(coordinator)
    thread = coordinator.runs._threads[run_id]
    plain = thread._say

    def say(state: str, detail: str) -> Any:
        gone = plain(state, detail)
        if state == "paused":  # and before the thread has ended
            stopped.append(operator.submit(coordinator.runs.stop, run_id, now))
            asked.wait(60)
        return gone

    def ask(state: str, detail: str = "") -> None:
        tell(state, detail)
        asked.set()

    operator, stopped = ThreadPoolExecutor(1), list[Future[Any]]()
    asked, tell = threading.Event(), thread.halt if now else thread.end_after_round
    monkeypatch.setattr(thread, "_say", say)
    monkeypatch.setattr(coordinator.runs, "_thread", coordinator.runs._threads.get)
    halt = thread.halt
    monkeypatch.setattr(thread, "halt" if now else "end_after_round", ask)
    halt("paused", f"{NO_SPACE} in the state folder")
    thread.join(120)
    assert stopped[0].result(60).state == "stopped"
    assert coordinator.runs.get(run_id).state == "stopped"


def test_a_run_that_is_stopped_while_it_is_taken_up_keeps_its_model(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = submit(coordinator)
    coordinator.serve(run_id, until=lambda: coordinator.runs.get(run_id).rounds_done >= 1)
    coordinator.runs.stop(run_id, True)
    final = coordinator.runs.folder(run_id) / "checkpoints" / "final.safetensors"
    before, plain = load_file(final), RunThread._take_up

    def taken_up(thread: RunThread) -> None:
        thread.halt("stopped")
        plain(thread)

    monkeypatch.setattr(RunThread, "_take_up", taken_up)
    coordinator.runs.resume(run_id)
    assert coordinator.serve(run_id).startswith("stopped")
    after = load_file(final)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("now", [True, False])
def test_a_stop_between_two_checkpoints_leaves_the_journal_of_the_model(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch, now: bool
) -> None:
    """The stop comes when the version before has been committed without a checkpoint."""
    values = config(
        "fedbuff", scheduler={"name": "buffer", "size": 2}, round={"sample": 3}, run={"rounds": 50},
        deployment={"min_clients": N, "checkpoint_every": 20},
    )  # fmt: skip
    values["output"] = {"report": False, "plots": False}
    plain = RunThread._commit

    def commit(thread: RunThread, record: Any, outcome: str) -> None:
        plain(thread, record, outcome)
        if record["round"] == 7:
            thread.halt("stopped") if now else thread.end_after_round("stopped")

    monkeypatch.setattr(RunThread, "_commit", commit)
    run_id = coordinator.runs.submit(toml_of(values), "run", "", "").run_id
    assert coordinator.serve(run_id).startswith("stopped")
    coordinator.runs.pause(run_id)  # returns when its last word is said
    folder = coordinator.runs.folder(run_id)
    loaded = load_config(folder / "config.toml", sets=["run.rounds=7"]).config
    replay = Replay(loaded, read_journal(folder / "journal.jsonl"))
    assert len(list(replay)) == 8
    want, got = replay.model_tensors(), load_file(folder / "checkpoints" / "final.safetensors")
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_a_run_that_was_told_to_end_does_not_say_that_it_goes_on(coordinator: Coordinator) -> None:
    run_id = submit(coordinator)
    coordinator.serve(run_id, until=lambda: any(coordinator.runs.offer(n.node_id) for n in coordinator.nodes))
    assert coordinator.runs.stop(run_id, False).state == "stopping"
    thread = coordinator.runs._threads[run_id]
    thread._say("running", "")  # as after the last wait for clients
    assert coordinator.runs.get(run_id).state == "stopping"
    assert coordinator.serve(run_id).startswith("stopped")
