"""Runs of a coordinator over real training, without a network: parity, verdicts, pauses, damage."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import select

from fedsim import Simulation
from fedsim.config import load_config
from fedsim.errors import ConfigError
from fedsim.identity import Key
from fedsim.pb import federation_pb2 as pb
from fedsim.server import remote, summing
from fedsim.server.desk import Place
from fedsim.server.remote import RemoteEngine
from fedsim.server.run_table import NoSuchRun
from fedsim.server.tables import journal, run_members, submissions, tasks
from fedsim.simulation.replay import Replay, read_journal
from fedsim.types import UpdateBlock
from tests.fleet import Coordinator, make_nodes, toml_of
from tests.wired import config

N = 4


def settings(strategy: str = "fedavg", **tables: Any) -> dict[str, Any]:
    values = config(strategy, **tables)
    values["output"] = {"report": False, "plots": False}
    values["deployment"] = {"min_clients": N, **tables.get("deployment", {})}
    return values


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    made = Coordinator(tmp_path / "state", Key.new(), make_nodes(tmp_path, N)).start()
    yield made
    made.stop()


def submit(coordinator: Coordinator, values: dict[str, Any], key: str = "") -> str:
    return coordinator.runs.submit(toml_of(values), "run", key, "").run_id


def final(coordinator: Coordinator, run_id: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(coordinator.runs.folder(run_id) / "checkpoints" / "final.safetensors")


def lines(coordinator: Coordinator, run_id: str, name: str) -> list[dict[str, Any]]:
    text = (coordinator.runs.folder(run_id) / name).read_text()
    return [json.loads(line) for line in text.splitlines()]


def first_task(coordinator: Coordinator, run_id: str, node: int = 0) -> Any:
    """The open task of a node, as soon as there is one."""
    found: list[Any] = []

    def there() -> bool:
        found[:] = [coordinator.runs.offer(coordinator.nodes[node].node_id)]
        return found[0] is not None

    coordinator.serve(run_id, until=there)
    return found[0]


def body_of(task: Any, content: bytes, **fields: Any) -> pb.SubmitBody:
    body = pb.SubmitBody(
        run_id=task.run_id,
        task_id=task.task_id,
        key=os.urandom(16),
        update=pb.Object(digest=hashlib.sha256(content).digest(), size=len(content)),
        examples=5,
        local_steps=1,
        normaliser=0.1,
    )
    for name, value in fields.items():
        setattr(body, name, value)
    return body


ALONE = ("fedavg", "scaffold", "fedau", "fedspeed", "fedhyper", "fedvarp", "feddyn", "median")
TOGETHER = ("fedavg", "fedavgm", "fedhyper")


@pytest.mark.parametrize(
    ("strategy", "few"), [*((name, summing.FEW) for name in ALONE), *((name, 2) for name in TOGETHER)]
)
def test_real_clients_and_the_simulation_end_with_the_same_bits(
    coordinator: Coordinator, strategy: str, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of four clients a round; SHA-256 of every tensor equal. From `few` on sums are made together."""
    added: list[bool] = []

    def counted(*args: Any, **more: Any) -> UpdateBlock | None:
        added.append((block := summing.block_of_all(*args, **more)) is not None)
        return block

    monkeypatch.setattr(summing, "FEW", few)
    monkeypatch.setattr(remote, "block_of_all", counted)
    values = settings(strategy, round={"sample": 3})
    simulated = Simulation(values)
    records = list(simulated)
    run_id = submit(coordinator, values)
    assert coordinator.serve(run_id) == "ok"
    want, got = simulated.model_tensors(), final(coordinator, run_id)
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)
    same = ("round", "version", "outcome", "cohort", "received", "train_loss")
    found = [
        {k: v for k, v in line.items() if k in same} for line in lines(coordinator, run_id, "metrics.jsonl")
    ]
    assert found == [{k: v for k, v in record.items() if k in same} for record in records]
    assert all(added) if few == 2 else not any(added)


def test_adam_without_a_normaliser_is_stored_and_folded(coordinator: Coordinator) -> None:
    values = settings(client={"optimizer": "adam", "lr": 0.01})
    simulated = Simulation(values)
    list(simulated)
    run_id = submit(coordinator, values)
    assert coordinator.serve(run_id) == "ok"
    want, got = simulated.model_tensors(), final(coordinator, run_id)
    assert all(torch.equal(want[name], got[name]) for name in want)


@pytest.mark.parametrize(
    ("strategy", "scheduler"),
    [("fedbuff", {"name": "buffer", "size": 2}), ("fedasync", {"name": "immediate"})],
)
def test_an_asynchronous_run_equals_the_replay_of_its_journal(
    coordinator: Coordinator, strategy: str, scheduler: dict[str, Any]
) -> None:
    values = settings(strategy, scheduler=scheduler, round={"sample": 3}, run={"rounds": 6})
    run_id = submit(coordinator, values)
    assert coordinator.serve(run_id) == "ok"
    folder = coordinator.runs.folder(run_id)
    replay = Replay(load_config(folder / "config.toml").config, read_journal(folder / "journal.jsonl"))
    replayed = list(replay)
    want, got = replay.model_tensors(), final(coordinator, run_id)
    assert all(torch.equal(want[name], got[name]) for name in want)
    clocks = [line["clock_seconds"] for line in lines(coordinator, run_id, "metrics.jsonl")]
    assert clocks == [record["clock_seconds"] for record in replayed]


def test_answers_that_wait_for_many_versions_are_not_cleared_away(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All arrive in the first window, and one of them is folded in each of the next ones."""
    gate = threading.Event()
    next_event = RemoteEngine.next_event

    def gated(engine: RemoteEngine) -> Any:
        assert gate.wait(60)
        return next_event(engine)

    monkeypatch.setattr(RemoteEngine, "next_event", gated)
    values = settings("fedasync", scheduler={"name": "immediate"}, run={"seed": 3, "rounds": 8})
    run_id = submit(coordinator, values)
    for number, node in enumerate(coordinator.nodes):
        coordinator.turn(node, first_task(coordinator, run_id, number))
    gate.set()
    assert coordinator.serve(run_id) == "ok"
    folder = coordinator.runs.folder(run_id)
    replay = Replay(load_config(folder / "config.toml").config, read_journal(folder / "journal.jsonl"))
    list(replay)
    want, got = replay.model_tensors(), final(coordinator, run_id)
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_the_same_answer_twice_counts_once(coordinator: Coordinator) -> None:
    """R3, R14: DUPLICATE with the first verdict, before and after the round was committed."""
    run_id = submit(coordinator, settings())
    task = first_task(coordinator, run_id)
    node = coordinator.nodes[0]
    request, _, update = node.answer(task.offer(coordinator.key), lambda digest: None)
    first, second = (coordinator.submit(task, request, update) for _ in range(2))
    assert (first.verdict, second.verdict, second.first) == (pb.ACCEPTED, pb.DUPLICATE, pb.ACCEPTED)
    coordinator.serve(run_id, until=lambda: coordinator.runs.task(task.task_id) is None)
    body = pb.SubmitBody.FromString(request.body)
    later = coordinator.runs.earlier(node.node_id, body)
    assert later is not None
    assert (later.verdict, later.first) == (pb.DUPLICATE, pb.ACCEPTED)
    assert coordinator.runs.earlier(coordinator.nodes[1].node_id, body) is None, "S12: not its task"
    body.task_id = os.urandom(16)
    assert coordinator.runs.earlier(node.node_id, body) is None, "S12: a guess"
    assert coordinator.serve(run_id) == "ok"
    assert [line["received"] for line in lines(coordinator, run_id, "metrics.jsonl")][1:] == [N] * 3


def test_a_rejected_update_uses_the_task_up_and_strikes_exclude(coordinator: Coordinator) -> None:
    run_id = submit(coordinator, settings(deployment={"max_strikes": 2}))
    for _ in range(2):
        task = first_task(coordinator, run_id)
        body = body_of(task, b"x")
        request = pb.SubmitRequest(body=body.SerializeToString())
        decision = coordinator.runs.reject(
            task, body, request, "non_finite", "vectors/delta holds NaN"
        ).result()
        assert (decision.verdict, decision.reason) == (pb.REJECTED, "non_finite")
        round_index = task.round_index
        coordinator.serve(run_id, until=lambda r=round_index: _rounds(coordinator, run_id) > r)
    with coordinator.database.read() as connection:
        rows = connection.execute(select(run_members.c.strikes, run_members.c.excluded)).all()
    assert sorted(rows, key=lambda row: row[0])[-1] == (2, "2 refused updates")
    coordinator.runs.stop(run_id, True)
    refused = [c for c in lines(coordinator, run_id, "clients.jsonl") if c["verdict"] == "refused"]
    assert [c["reason"] for c in refused] == ["non_finite: vectors/delta holds NaN"] * 2


def _rounds(coordinator: Coordinator, run_id: str) -> int:
    return int(coordinator.runs.get(run_id).rounds_done)


def test_an_answer_after_the_round_is_late(coordinator: Coordinator) -> None:
    """R17: over-selection closes the round without the slowest, who is told so."""
    run_id = submit(coordinator, settings(round={"sample": 2, "overcommit": 1.5}))
    task = first_task(coordinator, run_id)
    request, _, update = coordinator.nodes[0].answer(task.offer(coordinator.key), lambda digest: None)
    others = coordinator.nodes[1:]
    coordinator.nodes, everybody = others, coordinator.nodes
    coordinator.serve(run_id, until=lambda: coordinator.runs.cancelled(task.task_id))
    coordinator.nodes = everybody
    assert coordinator.submit(task, request, update).verdict == pb.LATE
    assert coordinator.serve(run_id) == "ok"
    assert lines(coordinator, run_id, "metrics.jsonl")[1]["late"] == 1


def test_a_lease_that_ends_is_a_dropout_and_the_round_goes_on(coordinator: Coordinator) -> None:
    """R10."""
    run_id = submit(coordinator, settings())
    task = first_task(coordinator, run_id)
    coordinator.runs.expired(task.task_id)
    assert coordinator.serve(run_id) == "ok"
    record = lines(coordinator, run_id, "metrics.jsonl")[1]
    assert (record["received"], record["lost"], record["outcome"]) == (3, 1, "partial")


def test_a_task_that_waits_is_offered_again_until_its_attempts_are_used_up(coordinator: Coordinator) -> None:
    run_id = submit(coordinator, settings(deployment={"on_expired": "wait", "max_attempts": 3}))
    task = first_task(coordinator, run_id)
    offers = [pb.Task.FromString(task.offer(coordinator.key).body).attempt]
    for _ in range(2):
        coordinator.runs.expired(task.task_id)
        again = coordinator.runs.offer(coordinator.nodes[0].node_id)
        assert again is task
        offers.append(pb.Task.FromString(again.offer(coordinator.key).body).attempt)
    assert offers == [0, 1, 2]
    coordinator.runs.expired(task.task_id)
    assert coordinator.serve(run_id) == "ok"
    assert lines(coordinator, run_id, "metrics.jsonl")[1]["lost"] == 1


def test_all_clients_failing_ends_the_run_as_failed(coordinator: Coordinator) -> None:
    """R18: an explicit outcome, never an empty success."""
    values = settings(round={"max_failed": 2})
    run_id = submit(coordinator, values)
    while coordinator.runs.get(run_id).state == "running":
        for node in coordinator.nodes:
            task = coordinator.runs.offer(node.node_id)
            if task is not None:
                coordinator.runs.fail(task, "exception", "it raised").result()
    found = coordinator.runs.get(run_id)
    assert found.state == "failed"
    assert "exception: it raised" in found.detail
    failed = [line for line in lines(coordinator, run_id, "metrics.jsonl") if line["outcome"] == "failed"]
    assert len(failed) == 2


def test_too_few_clients_wait_with_a_visible_counter_and_then_fail(tmp_path: Path) -> None:
    """R19."""
    made = Coordinator(tmp_path / "state", Key.new(), make_nodes(tmp_path, 2)).start()
    try:
        run_id = submit(made, settings(deployment={"wait": 0.3}))
        made.serve(run_id)
        said = [json.loads(event.data).get("detail") for event in made.runs.events(run_id, 0)]
        found = made.runs.get(run_id)
        assert "waiting for clients: 2 of 4 are there" in said
        assert found.state == "failed"
        assert "not_enough_clients: 2 of 4" in found.detail
    finally:
        made.stop()


def test_a_paused_run_goes_on_and_its_clients_are_told_to_wait(coordinator: Coordinator) -> None:
    values = settings("scaffold")
    simulated = Simulation(values)
    list(simulated)
    run_id = submit(coordinator, values)
    task = first_task(coordinator, run_id)
    request, _, update = coordinator.nodes[0].answer(task.offer(coordinator.key), lambda digest: None)
    assert coordinator.runs.pause(run_id).state == "paused"
    body = pb.SubmitBody.FromString(request.body)
    waiting = coordinator.runs.earlier(coordinator.nodes[0].node_id, body)
    assert waiting is not None
    assert waiting.verdict == pb.RETRY
    coordinator.runs.resume(run_id)
    again = first_task(coordinator, run_id)
    assert again.task_id == task.task_id, "the assignment is durable"
    assert coordinator.submit(again, request, update).verdict == pb.ACCEPTED
    assert coordinator.serve(run_id) == "ok"
    want, got = simulated.model_tensors(), final(coordinator, run_id)
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_a_damaged_state_falls_back_to_the_one_before(coordinator: Coordinator) -> None:
    """R29: the digest does not fit, the round is aggregated again."""
    values = settings("scaffold", run={"rounds": 4})
    simulated = Simulation(values)
    list(simulated)
    run_id = submit(coordinator, values)
    coordinator.serve(run_id, until=lambda: _rounds(coordinator, run_id) >= 3)
    coordinator.runs.pause(run_id)
    states = sorted((coordinator.runs.folder(run_id) / "state").glob("*.safetensors"))
    assert len(states) == 2
    content = bytearray(states[-1].read_bytes())
    content[-1] ^= 1
    states[-1].write_bytes(content)
    coordinator.runs.resume(run_id)
    assert coordinator.serve(run_id) == "ok"
    want, got = simulated.model_tensors(), final(coordinator, run_id)
    assert all(torch.equal(want[name], got[name]) for name in want)
    assert [line["round"] for line in lines(coordinator, run_id, "metrics.jsonl")] == [0, 1, 2, 3, 4]


def test_without_any_sound_state_the_run_pauses_and_says_so(coordinator: Coordinator) -> None:
    run_id = submit(coordinator, settings())
    coordinator.serve(run_id, until=lambda: _rounds(coordinator, run_id) >= 1)
    coordinator.runs.pause(run_id)
    for state in (coordinator.runs.folder(run_id) / "state").glob("*.safetensors"):
        state.write_bytes(b"nothing")
    coordinator.runs.resume(run_id)
    assert coordinator.serve(run_id).startswith("paused damaged: no state of the run is intact")


def test_a_strategy_that_raises_pauses_the_run_with_the_model_before(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R27."""
    from fedsim.server import server_run

    made = server_run.build.build_strategy

    def broken(config: Any, given: Any = None) -> Any:
        def apply(*_: Any) -> Any:
            raise ZeroDivisionError("in apply")

        return made(config, given)._replace(apply=apply)

    monkeypatch.setattr(server_run.build, "build_strategy", broken)
    run_id = submit(coordinator, settings())
    assert coordinator.serve(run_id) == "paused error: ZeroDivisionError: in apply"
    monkeypatch.undo()
    coordinator.runs.resume(run_id)
    assert coordinator.serve(run_id) == "ok"
    simulated = Simulation(settings())
    list(simulated)
    want, got = simulated.model_tensors(), final(coordinator, run_id)
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_a_revoked_node_counts_no_more(coordinator: Coordinator) -> None:
    run_id = submit(coordinator, settings())
    task = first_task(coordinator, run_id)
    request, _, update = coordinator.nodes[0].answer(task.offer(coordinator.key), lambda digest: None)
    assert coordinator.submit(task, request, update).verdict == pb.ACCEPTED
    coordinator.runs.revoke(coordinator.nodes[0].node_id)
    coordinator.serve(run_id, until=lambda: _rounds(coordinator, run_id) >= 1)
    coordinator.runs.stop(run_id, True)
    record = lines(coordinator, run_id, "metrics.jsonl")[1]
    assert (record["received"], record["refused"]) == (3, 1)


def test_a_run_that_brings_the_coordinator_down_again_and_again_is_left_alone(
    coordinator: Coordinator,
) -> None:
    run_id = submit(coordinator, settings())
    coordinator.serve(run_id, until=lambda: coordinator.runs.offer(coordinator.nodes[0].node_id) is not None)
    coordinator.stop()
    for _ in range(5):
        coordinator.start()
        coordinator.stop()  # without a committed round in between
    coordinator.start()
    found = coordinator.runs.get(run_id)
    assert (found.state, found.detail[:25]) == ("paused", "crash_loop: taken up 5 ti")
    coordinator.runs.resume(run_id)
    assert coordinator.serve(run_id) == "ok"


def test_a_full_disk_pauses_the_run_and_loses_nothing(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R8: the state cannot be written; once there is room the run goes on to the same model."""
    from fedsim import bundle
    from fedsim.errors import EnvironmentProblem

    values = settings("scaffold")
    written = bundle.encode_to

    def full(path: Path, *rest: Any) -> Any:
        if path.name.startswith("000002"):
            raise EnvironmentProblem("no space left", code="FS-ENV-021")
        return written(path, *rest)

    monkeypatch.setattr(bundle, "encode_to", full)
    run_id = submit(coordinator, values)
    assert coordinator.serve(run_id) == "paused storage: no space left"
    monkeypatch.undo()
    coordinator.runs.resume(run_id)
    assert coordinator.serve(run_id) == "ok"
    simulated = Simulation(values)
    list(simulated)
    want, got = simulated.model_tensors(), final(coordinator, run_id)
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_a_run_key_names_one_run(coordinator: Coordinator) -> None:
    values = settings()
    first, second = submit(coordinator, values, "night"), submit(coordinator, values, "night")
    assert first == second
    with pytest.raises(ConfigError, match="belongs to another run") as caught:
        submit(coordinator, settings("scaffold"), "night")
    assert caught.value.code == "FS-SRV-052"
    with pytest.raises(NoSuchRun):
        coordinator.runs.get("nothing")
    coordinator.runs.stop(first, True)


def test_two_runs_share_the_clients(coordinator: Coordinator) -> None:
    one, two = submit(coordinator, settings()), submit(coordinator, settings("scaffold"))
    assert coordinator.serve(one) == "ok"
    assert coordinator.serve(two) == "ok"


@pytest.mark.parametrize(
    ("tables", "code"),
    [
        ({"devices": {"name": "linear"}}, "FS-CFG-132"),
        ({"strategy": {"name": "async_fedavg"}, "scheduler": {"name": "immediate"}}, "FS-CFG-133"),
        ({"model": {"name": "mlp", "target": "os:getcwd"}}, None),
    ],
)
def test_what_only_a_simulation_can_do_is_refused(
    coordinator: Coordinator, tables: dict[str, Any], code: str | None
) -> None:
    values = settings()
    for name, table in tables.items():
        values[name] = {**values.get(name, {}), **table}
    with pytest.raises(ConfigError) as caught:
        submit(coordinator, values)
    assert code is None or caught.value.code == code
    assert not list(coordinator.runs.list())


def test_what_is_over_is_cleared_away(coordinator: Coordinator) -> None:
    """R23: rows and files of windows that nobody returns to are gone; the folder has the whole journal."""
    run_id = submit(coordinator, settings(run={"rounds": 12}))
    assert coordinator.serve(run_id) == "ok"
    coordinator.runs.pause(run_id)  # waits for what comes after the last word, and pauses nothing
    tables = (tasks, submissions, journal)
    with coordinator.database.read() as connection:
        counts = [len(connection.execute(select(table.c[0])).all()) for table in tables]
    assert counts[0] <= 2 * N
    assert counts[1] <= 2 * N
    assert counts[2] <= 2 * (N + 3)
    entries = read_journal(coordinator.runs.folder(run_id) / "journal.jsonl")
    assert [e.seq for e in entries] == list(range(1, 12 * (N + 3) + 1))
    assert len(list(coordinator.state.rglob("*.seg"))) <= 3
    assert len(list((coordinator.runs.folder(run_id) / "state").glob("*.safetensors"))) == 2


def test_a_large_update_and_a_small_one_fold_to_the_same(tmp_path: Path) -> None:
    """Among the objects, or in a segment."""
    finals = []
    for place in ("object", "segment"):
        made = Coordinator(tmp_path / place, Key.new(), make_nodes(tmp_path / f"{place}-nodes", N)).start()
        if place == "object":
            send = made.submit

            def as_object(task: Any, request: Any, update: bytes, made: Coordinator = made) -> Any:
                body = pb.SubmitBody.FromString(request.body)
                made.runs.objects.put(update)
                return made.runs.accept(task, body, request, Place(body.update.digest, len(update))).result()

            made.submit = as_object  # type: ignore[method-assign]
            assert send is not as_object
        run_id = submit(made, settings())
        assert made.serve(run_id) == "ok"
        finals.append(final(made, run_id))
        made.stop()
    assert all(torch.equal(finals[0][name], finals[1][name]) for name in finals[0])
