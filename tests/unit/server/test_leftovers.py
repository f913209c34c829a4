"""What a run leaves on the disk and in the database: no more than a return to a checkpoint needs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from sqlalchemy import func, select

from fedsim import Simulation
from fedsim.bundle import digest
from fedsim.config import load_config
from fedsim.identity import Key
from fedsim.pb import federation_pb2 as pb
from fedsim.server.desk import Decision, Place
from fedsim.server.leftovers import Leftovers
from fedsim.server.tables import journal, submissions, tasks, uploads
from fedsim.server.upload_rows import UploadRefused
from fedsim.simulation.replay import Replay, read_journal
from tests.fleet import Coordinator, Node, make_nodes, toml_of
from tests.state_folders import send
from tests.wired import config

N = 4


class Left(NamedTuple):
    """How much there is."""

    objects: int
    parts: int
    segments: int
    uploads: int
    tasks: int
    submissions: int
    journal: int


class Uploading(Coordinator):
    """Every update is uploaded, and every other one twice."""

    def submit(self, task: Any, request: pb.SubmitRequest, update: bytes) -> Decision:
        body = pb.SubmitBody.FromString(request.body)
        with suppress(UploadRefused):  # the run ended meanwhile
            for _ in range(1 + task.client % 2):
                self.upload(task, update)
        place = Place(body.update.digest, len(update))
        return self.runs.accept(task, body, request, place).result(timeout=120)

    def upload(self, task: Any, update: bytes, size: int | None = None) -> bytes:
        """The whole update, or its first bytes; the name of the upload."""
        name = os.urandom(16)
        of = pb.Object(digest=digest(update), size=len(update))
        start = pb.UploadStart(upload_id=name, generation=1, task_id=task.task_id, object=of)
        upload = self.uploads.start(task.node_id, start, task.max_update_bytes)
        try:
            send(upload, 0, len(update) if size is None else size, update)
            if size is None:
                upload.finish()
        finally:
            upload.close()
        return name

    def left(self) -> Left:
        def files(name: str, of: str = "*") -> int:
            return sum(path.is_file() for path in (self.state / name).rglob(of))

        with self.database.read() as connection:
            rows = [
                int(connection.execute(select(func.count()).select_from(table)).scalar() or 0)
                for table in (uploads, tasks, submissions, journal)
            ]
        return Left(files("objects"), files("uploads"), files("segments"), *rows)


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Uploading]:
    made = Uploading(tmp_path / "state", Key.new(), make_nodes(tmp_path, N), inline_bytes=0)
    made.start()
    yield made
    made.stop()


def settings(name: str = "scaffold", **tables: Any) -> dict[str, Any]:
    values = config(name)
    for table, more in tables.items():
        values[table] = {**values.get(table, {}), **more}
    values["output"] = {"report": False, "plots": False}
    values["deployment"] = {"min_clients": N, "max_strikes": 1000, **tables.get("deployment", {})}
    return values


def submit(coordinator: Coordinator, values: dict[str, Any], name: str = "run") -> str:
    return coordinator.runs.submit(toml_of(values), name, "", "").run_id


def rounds(coordinator: Coordinator, run_id: str) -> int:
    return int(coordinator.runs.get(run_id).rounds_done)


def served(coordinator: Coordinator, run_id: str, done: int) -> None:
    coordinator.serve(run_id, until=lambda: rounds(coordinator, run_id) >= done)


def ended(coordinator: Coordinator, run_id: str) -> str:
    """Let the run go on to its end, with what comes after its last word."""
    state = coordinator.serve(run_id)
    coordinator.runs.pause(run_id)  # waits, and pauses nothing
    return state


def open_task(coordinator: Coordinator, run_id: str, node: Node) -> Any:
    """The open task of this node in a round that nobody has answered yet."""
    found: list[Any] = []

    def there() -> bool:
        found[:] = [coordinator.runs.offer(node.node_id)]
        return found[0] is not None

    everybody, coordinator.nodes = coordinator.nodes, [node]
    coordinator.serve(run_id, until=there)
    coordinator.nodes = everybody
    return found[0]


def answer(coordinator: Coordinator, node: Node, task: Any) -> tuple[pb.SubmitRequest, bytes]:
    request, _, update = node.answer(
        task.offer(coordinator.key), lambda name: coordinator.runs.fetchable(node.node_id, name)
    )
    return request, update


def same_model(coordinator: Coordinator, run_id: str, values: dict[str, Any]) -> bool:
    from safetensors.torch import load_file

    simulated = Simulation(values)
    list(simulated)
    got = load_file(coordinator.runs.folder(run_id) / "checkpoints" / "final.safetensors")
    want = simulated.model_tensors()
    return want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)


def test_rejected_late_and_repeated_uploads_do_not_pile_up(coordinator: Uploading) -> None:
    """In every round one node's upload is rejected, and the end of the round cuts another one's short."""
    values = settings(run={"rounds": 7}, round={"sample": 2, "overcommit": 2.0})
    run_id = submit(coordinator, values)
    everybody, seen = coordinator.nodes, []
    for done in range(1, 7):
        bad, slow, *good = everybody
        task = open_task(coordinator, run_id, bad)
        request, update = answer(coordinator, bad, task)
        coordinator.upload(task, update[:-1])
        body = pb.SubmitBody.FromString(request.body)
        rejected = coordinator.runs.reject(task, body, request, "schema", "it is too short").result()
        assert rejected.verdict == pb.REJECTED
        late = open_task(coordinator, run_id, slow)
        request, update = answer(coordinator, slow, late)
        coordinator.upload(late, update, size=len(update) // 2)
        coordinator.nodes = good
        served(coordinator, run_id, done)
        coordinator.nodes = everybody
        open_task(coordinator, run_id, bad)  # of the next round: what went before is cleared away
        assert coordinator.submit(late, request, update).verdict == pb.LATE
        seen.append(coordinator.left())
    for early, later in zip(zip(*seen[2:4], strict=True), zip(*seen[4:], strict=True), strict=True):
        assert max(later) <= max(early), seen
    assert ended(coordinator, run_id) == "ok"
    left = coordinator.left()
    assert left == (0, 0, 0, 0, left.tasks, left.submissions, 0)


def test_a_run_that_came_to_its_end_leaves_verdicts_alone_and_those_for_a_day(
    coordinator: Uploading,
) -> None:
    """R3: a client whose reply was lost hears of it after the end of the run too."""
    values = settings()
    run_id = submit(coordinator, values)
    served(coordinator, run_id, 2)
    node = coordinator.nodes[0]
    task = open_task(coordinator, run_id, node)
    request, update = answer(coordinator, node, task)
    assert coordinator.submit(task, request, update).verdict == pb.ACCEPTED
    assert ended(coordinator, run_id) == "ok"
    left = coordinator.left()
    assert left == (0, 0, 0, 0, left.tasks, left.submissions, 0)
    assert 0 < left.tasks <= 2 * N
    body = pb.SubmitBody.FromString(request.body)
    again = coordinator.runs.earlier(node.node_id, body)
    assert again is not None
    assert (again.verdict, again.first) == (pb.DUPLICATE, pb.ACCEPTED)
    coordinator.runs.leftovers.collect()
    assert coordinator.left() == left, "not yet a day"
    coordinator.runs.leftovers.collect(0.0)
    assert coordinator.left() == (0, 0, 0, 0, 0, 0, 0)
    folder = coordinator.runs.folder(run_id)
    replay = Replay(load_config(folder / "config.toml").config, read_journal(folder / "journal.jsonl"))
    assert len(list(replay)) == 4
    assert same_model(coordinator, run_id, values)
    assert coordinator.runs.resume(run_id).state == "ok", "there is nothing to go on with"


def test_small_updates_go_at_the_end_too(tmp_path: Path) -> None:
    made = Coordinator(tmp_path / "state", Key.new(), make_nodes(tmp_path, N)).start()
    run_id = submit(made, settings())
    served(made, run_id, 1)
    assert list((made.state / "segments").rglob("*.seg"))
    assert ended(made, run_id) == "ok"
    assert list((made.state / "segments").iterdir()) == []
    made.stop()


def test_a_stopped_run_keeps_accepted_answers_and_nothing_half_sent(coordinator: Uploading) -> None:
    values = settings()
    run_id = submit(coordinator, values)
    served(coordinator, run_id, 1)
    first, second = (open_task(coordinator, run_id, node) for node in coordinator.nodes[:2])
    request, update = answer(coordinator, coordinator.nodes[0], first)
    assert coordinator.submit(first, request, update).verdict == pb.ACCEPTED
    _, half = answer(coordinator, coordinator.nodes[1], second)
    coordinator.upload(second, half, size=len(half) // 2)
    assert coordinator.runs.stop(run_id, True).state == "stopped"
    left = coordinator.left()
    assert (left.uploads, left.parts) == (0, 0)
    assert coordinator.runs.objects.read(digest(update)) == update
    coordinator.stop()
    coordinator.start()
    assert coordinator.runs.objects.read(digest(update)) == update, "the next start keeps it as well"
    coordinator.runs.resume(run_id)
    again = open_task(coordinator, run_id, coordinator.nodes[1])
    assert again.task_id == second.task_id
    assert coordinator.runs.offer(coordinator.nodes[0].node_id) is None, "it has answered"
    assert ended(coordinator, run_id) == "ok"
    assert same_model(coordinator, run_id, values)


def test_what_a_crash_kept_from_being_removed_goes_at_the_next_start(
    coordinator: Uploading, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = settings(run={"rounds": 5})
    monkeypatch.setattr(Leftovers, "clear", lambda self, forgotten: None)
    monkeypatch.setattr(Leftovers, "run_over", lambda self, run_id, state, forgotten: None)
    run_id = submit(coordinator, values)
    served(coordinator, run_id, 4)
    coordinator.runs.pause(run_id)
    before = coordinator.left()
    assert before.uploads >= 4 * N
    coordinator.stop()
    coordinator.start()
    swept = coordinator.left()
    assert swept.uploads <= 2 * 2 * N < before.uploads
    assert 0 < swept.objects < before.objects
    coordinator.runs.resume(run_id)
    assert ended(coordinator, run_id) == "ok"
    coordinator.stop()
    coordinator.start()
    assert coordinator.left()[:4] == (0, 0, 0, 0)
    assert same_model(coordinator, run_id, values)


def test_a_run_does_not_remove_what_another_one_names(coordinator: Uploading) -> None:
    """Two runs of one configuration: the same models under the same digests."""
    values = settings()
    first = submit(coordinator, values, "one")
    task = open_task(coordinator, first, coordinator.nodes[0])
    coordinator.runs.pause(first)
    second = submit(coordinator, values, "two")
    assert ended(coordinator, second) == "ok"
    assert coordinator.runs.objects.has(task.message.object.digest)
    coordinator.runs.resume(first)
    assert ended(coordinator, first) == "ok"
    assert all(same_model(coordinator, run_id, values) for run_id in (first, second))
    assert coordinator.left()[:4] == (0, 0, 0, 0)


def test_answers_that_were_refused_for_their_age_are_forgotten(coordinator: Uploading) -> None:
    """Nobody closes their tasks but the window in which they were weighed."""
    values = settings(
        "fedasync",
        strategy={"max_staleness": 0},
        scheduler={"name": "immediate"},
        run={"rounds": 14},
        round={"sample": N, "max_failed": 100},
        deployment={"checkpoint_every": 1},
    )
    run_id = submit(coordinator, values)
    counts = []
    for done in (6, 12):
        served(coordinator, run_id, done)
        coordinator.runs.pause(run_id)
        counts.append(coordinator.left())
        coordinator.runs.resume(run_id)
    assert max(one.tasks for one in counts) <= 4 * N, counts
    assert max(one.objects for one in counts) <= 6 * N, counts
    assert ended(coordinator, run_id) == "ok"
    coordinator.runs.leftovers.collect()  # others were at work: an upload may have begun after the end
    assert coordinator.left()[:4] == (0, 0, 0, 0)
    folder = coordinator.runs.folder(run_id)
    records = (folder / "clients.jsonl").read_text() if (folder / "clients.jsonl").exists() else ""
    assert '"refused"' in records


def test_who_watches_runs_hears_of_their_end_but_not_of_a_pause(coordinator: Uploading) -> None:
    over: list[str] = []
    coordinator.runs.on_over = over.append
    run_id = submit(coordinator, settings(), "digits")
    served(coordinator, run_id, 1)
    coordinator.runs.pause(run_id)
    assert over == []
    coordinator.runs.resume(run_id)
    assert ended(coordinator, run_id) == "ok"
    assert over == ["digits"]
    other = submit(coordinator, settings(), "letters")
    coordinator.runs.pause(other)
    coordinator.runs.stop(other, False)
    assert over == ["digits", "letters"]
