"""The service that operators call, over real gRPC: roles, names, watching, files."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

from fedsim.client import operator_link
from fedsim.client.operator import Operator
from fedsim.client.operator_problems import CoordinatorRefused
from fedsim.client.problems import CoordinatorProblem
from fedsim.errors import FedsimError
from fedsim.identity import Key
from fedsim.pb import federation_pb2 as pb
from fedsim.pb.federation_pb2_grpc import ControlStub
from fedsim.server import watch
from fedsim.transport import TICKET
from tests.control_server import RUN_ID, Desk, control_desk, record

CONFIG = "[run]\nseed = 1\n"
NAMES = [
    "../secret",
    "..",
    "a/../b",
    "/etc/passwd",
    "a\x00b",
    "a\r\nb",
    "\U0001f600",
    "x" * 10_000,
    "",
    "~root",
    "a\\b",
]


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with control_desk(tmp_path) as made:
        yield made


def refusal(call: Any, *arguments: Any, **named: Any) -> tuple[str, str]:
    """Code of the error and status of the call that was refused."""
    with pytest.raises(FedsimError) as caught:
        list(call(*arguments, **named))
    return caught.value.code, getattr(caught.value, "status", "")


def test_each_role_may_do_what_is_its_own(desk: Desk) -> None:
    reading = ["list", "nodes", "version"]
    with desk.operator("viewer") as viewer:
        for name in reading:
            getattr(viewer, name)()
        assert viewer.get("digits").run_id == RUN_ID
        for call in (
            lambda: viewer.submit(CONFIG),
            lambda: viewer.pause(RUN_ID),
            lambda: viewer.resume(RUN_ID),
            lambda: viewer.stop(RUN_ID),
            lambda: viewer.invite(),
            viewer.drain,
        ):
            assert refusal(call)[0] == "FS-SRV-025"
    with desk.operator("operator") as operator:
        operator.submit(CONFIG)
        assert operator.pause(RUN_ID).state == "paused"
        assert operator.resume(RUN_ID).state == "running"
        assert operator.stop(RUN_ID).state == "stopping"
        assert operator.stop(RUN_ID, now=True).state == "stopped"
        for call in (
            lambda: operator.approve("a"),
            lambda: operator.revoke("a"),
            lambda: operator.label("a", {}),
            lambda: operator.invite(),
            operator.drain,
        ):
            assert refusal(call)[0] == "FS-SRV-025"
    assert desk.drained == []
    with desk.operator("admin") as admin:
        admin.drain()
        assert admin.invite("viewer").token
    assert desk.drained == [True]


def test_a_client_has_no_business_here(desk: Desk) -> None:
    with desk.operator("client") as client:
        assert refusal(client.list)[0] == "FS-SRV-025"
        assert refusal(client.watch, RUN_ID)[0] == "FS-SRV-025"
        assert refusal(client.artifact, RUN_ID, "final", Path("x"))[0] == "FS-SRV-025"
        assert refusal(client.logs, RUN_ID)[0] == "FS-SRV-025"


def test_without_a_ticket_every_call_is_refused(desk: Desk) -> None:
    async def codes() -> set[grpc.StatusCode]:
        found = set()
        async with grpc.aio.insecure_channel(desk.address) as channel:
            stub: Any = ControlStub(channel)
            for method, request in {
                "SubmitRun": pb.SubmitRunRequest(), "ListRuns": pb.ListRunsRequest(),
                "GetRun": pb.RunRequest(), "WatchRun": pb.WatchRequest(), "PauseRun": pb.RunRequest(),
                "ResumeRun": pb.RunRequest(), "StopRun": pb.StopRequest(),
                "ListNodes": pb.ListNodesRequest(), "ApproveNode": pb.NodeRequest(),
                "RevokeNode": pb.NodeRequest(), "LabelNode": pb.LabelRequest(),
                "CreateEnrolToken": pb.TokenRequest(), "GetArtifact": pb.ArtifactRequest(),
                "GetLogs": pb.LogsRequest(), "Drain": pb.DrainRequest(), "Version": pb.VersionRequest(),
            }.items():  # fmt: skip
                call = getattr(stub, method)(request, timeout=60)
                found.add(await call.code())
        return found

    assert asyncio.run(codes()) == {grpc.StatusCode.UNAUTHENTICATED}
    assert desk.drained == []


def test_an_unknown_key_and_another_coordinator_are_refused(desk: Desk) -> None:
    with (
        Operator(desk.connection(), Key.new(), patience=3.0) as stranger,
        pytest.raises(CoordinatorProblem) as caught,
    ):
        stranger.list()
    assert (caught.value.code, caught.value.exit_code) == ("FS-SRV-023", 3)
    with desk.operator(server_id=bytes(32)) as misled, pytest.raises(CoordinatorProblem) as caught:
        misled.list()
    assert caught.value.code == "FS-CLI-004"


def test_a_submission_reaches_the_runs_with_a_key_in_any_case(desk: Desk) -> None:
    with desk.operator("operator") as operator:
        operator.submit(CONFIG, name="digits", nodes="site == a")
        operator.submit(CONFIG, name="digits", nodes="site == a")
        operator.submit(CONFIG, run_key="mine")
        first, second, third = desk.runs.submitted
        assert first[:2] + first[3:] == (CONFIG, "digits", "site == a")
        assert first[2]
        assert first[2] != second[2]
        assert third[2] == "mine"
        assert refusal(operator.submit, CONFIG + "x = 1\n", run_key="mine") == (
            "FS-SRV-024",
            "ALREADY_EXISTS",
        )
        with pytest.raises(CoordinatorRefused) as caught:
            operator.submit("nothing")
    assert "FS-CFG-131: no table [run]; [run]; add it" in str(caught.value.why)
    written = [json.loads(line)["action"] for line in desk.audit.path.read_text().splitlines()]
    assert written.count("run_submitted") == 3


@pytest.mark.parametrize("name", [n for n in NAMES if n])
def test_names_of_runs_that_are_none_are_refused(desk: Desk, name: str) -> None:
    with desk.operator() as operator:
        assert refusal(operator.get, name) == ("FS-SRV-024", "INVALID_ARGUMENT")
        assert refusal(operator.submit, CONFIG, name=name) == ("FS-SRV-024", "INVALID_ARGUMENT")
        assert refusal(operator.watch, name) == ("FS-SRV-024", "INVALID_ARGUMENT")
        assert refusal(operator.approve, name)[1] == "INVALID_ARGUMENT"
    assert desk.runs.submitted == []


def test_sizes_of_a_submission_are_bounded(desk: Desk) -> None:
    with desk.operator() as operator:
        for call in (
            lambda: operator.submit(""),
            lambda: operator.submit("x" * (1024 * 1024 + 1)),
            lambda: operator.submit(CONFIG, run_key="k" * 200),
            lambda: operator.submit(CONFIG, nodes="x" * 2_000),
            lambda: operator.submit(CONFIG, nodes="a\nb"),
        ):
            assert refusal(call) == ("FS-SRV-024", "INVALID_ARGUMENT")


def test_a_run_or_node_that_is_not_there_is_not_found(desk: Desk) -> None:
    with desk.operator() as operator:
        assert refusal(operator.get, "other") == ("FS-SRV-024", "NOT_FOUND")
        assert refusal(operator.approve, "nobody") == ("FS-SRV-024", "NOT_FOUND")


def test_nodes_are_listed_labelled_and_shut_out(desk: Desk) -> None:
    node = desk.known("client")
    desk.online.add(node.node_id)
    with desk.operator() as admin:
        (found,) = [n for n in admin.nodes() if n.role == "client"]
        assert (found.node_id, found.state, found.online) == (node.node_id, "approved", True)
        assert found.fingerprint == node.fingerprint
        assert admin.label(node.node_id, {"site": "a", "gpu": ""}).labels == {"site": "a", "gpu": ""}
        assert admin.label(node.node_id, {}, remove=["gpu"]).labels == {"site": "a"}
        assert admin.revoke(node.node_id).state == "revoked"
        assert desk.runs.revoked == [node.node_id]
        assert desk.forgotten == [node.node_id]
        assert refusal(admin.approve, node.node_id) == ("FS-SRV-024", "FAILED_PRECONDITION")


def test_an_operator_that_is_revoked_is_out_at_once(desk: Desk) -> None:
    with desk.operator() as admin, desk.operator("operator") as other:
        assert other.list()
        (node,) = [n for n in admin.nodes() if n.role == "operator"]
        admin.revoke(node.node_id)
        assert refusal(other.list)[0] == "FS-SRV-023"


def test_a_watcher_sees_every_event_once_and_the_watch_ends_with_the_run(desk: Desk) -> None:
    desk.runs.tell("round", **record(0))
    with desk.operator("viewer") as viewer:
        seen = []
        for event in viewer.watch("digits"):
            seen.append((event.revision, event.type))
            if event.revision == 1:
                desk.runs.tell("round", **record(1))
            elif event.revision == 2:
                desk.runs.end()
        assert seen == [(1, "round"), (2, "round"), (3, "state")]
        assert [e.revision for e in viewer.watch(RUN_ID, after=2)] == [3]
        assert list(viewer.watch(RUN_ID, after=99)) == []


def test_more_events_than_one_batch_arrive_in_order(desk: Desk) -> None:
    for number in range(2 * watch.BATCH + 7):
        desk.runs.tell("round", round=number)
    desk.runs.end()
    with desk.operator("viewer") as viewer:
        assert [e.revision for e in viewer.watch(RUN_ID)] == list(range(1, 2 * watch.BATCH + 9))


def test_a_watch_that_lasts_too_long_times_out_and_what_ticks_may_end_it(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operator_link, "_TICK_SECONDS", 0.05)
    with desk.operator("viewer") as viewer:
        with pytest.raises(FedsimError) as caught:
            list(viewer.watch(RUN_ID, seconds=0.2))
        assert (caught.value.code, caught.value.exit_code) == ("FS-SRV-027", 4)

        def tick() -> None:
            raise LookupError

        with pytest.raises(LookupError):
            list(viewer.watch(RUN_ID, tick=tick))


def test_a_slow_watcher_is_cut_counted_and_told_where_to_go_on(desk: Desk) -> None:
    desk.control.watchers._slow_seconds = 0.3
    for number in range(200):
        desk.runs.tell("round", round=number, text="x" * 200_000)
    desk.runs.end()
    slow = desk.operator("viewer")
    slow.version()  # logs in

    async def hang() -> tuple[str, int]:
        ticket = slow._link._ticket
        async with grpc.aio.insecure_channel(desk.address) as channel:
            stub: Any = ControlStub(channel)
            call = stub.WatchRun(pb.WatchRequest(run_id=RUN_ID), metadata=((TICKET, ticket),))
            first = await call.read()
            await asyncio.to_thread(_until, lambda: b"dropped_total 1.0" in desk.telemetry.render())
            read = first.revision
            with suppress(grpc.aio.AioRpcError):
                while (event := await call.read()) is not grpc.aio.EOF:
                    read = event.revision
            assert await call.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            return await call.details(), read

    with slow:
        text, read = asyncio.run(hang())
    resume = int(text.rpartition(" ")[2])
    # The event that could not be written in time may have arrived all the same: it is given once.
    assert resume in (read, read - 1)
    assert len(desk.control.watchers) == 0
    with desk.operator("viewer") as fast:
        rest = [e.revision for e in fast.watch(RUN_ID, after=read)]
    assert rest == list(range(read + 1, 202))


def _until(done: Any) -> None:
    ended = threading.Event()
    for _ in range(3_000):
        if done():
            return
        ended.wait(0.02)
    raise AssertionError("it did not happen")


def test_watchers_are_bounded(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "MOST_WATCHERS", 1)
    desk.runs.tell("round", **record(0))
    with desk.operator("viewer") as one, desk.operator("viewer", patience=0.2) as two:
        first = one.watch(RUN_ID)
        next(first)
        assert refusal(two.watch, RUN_ID, patience=0.2)[0] == "FS-SRV-022"  # asked to come back later
        desk.runs.end()
        assert [e.type for e in first] == ["state"]
        assert len(list(two.watch(RUN_ID))) == 2


def test_a_watch_goes_on_behind_its_last_event_after_the_link_broke(desk: Desk) -> None:
    desk.runs.tell("round", **record(0))
    with desk.operator("viewer", patience=10.0) as viewer:
        events = viewer.watch(RUN_ID)
        assert next(events).revision == 1
        watchers = desk.control.watchers

        async def cut() -> None:
            watchers.close()
            while len(watchers):
                await asyncio.sleep(0.01)
            watchers._closed = False

        desk.runs.tell("round", **record(1))
        assert next(events).revision == 2
        desk.on_loop(cut())
        desk.runs.tell("round", **record(2))
        desk.runs.end()
        assert [e.revision for e in events] == [3, 4]


def test_artifacts_are_brought_whole_in_chunks(desk: Desk, tmp_path: Path) -> None:
    content = os.urandom(300_000)
    (desk.runs.path / "checkpoints").mkdir()
    (desk.runs.path / "checkpoints" / "final.safetensors").write_bytes(content)
    (desk.runs.path / "metrics.jsonl").write_text("{}\n")
    with desk.operator("viewer") as viewer:
        for name in ("final", "checkpoints/final.safetensors", "latest"):
            assert viewer.artifact("digits", name, tmp_path / "got") == len(content)
            assert (tmp_path / "got").read_bytes() == content
        assert viewer.artifact(RUN_ID, "metrics.jsonl", tmp_path / "lines") == 3
        assert refusal(viewer.artifact, RUN_ID, "best", tmp_path / "none") == ("FS-SRV-024", "NOT_FOUND")
    assert {p.name for p in tmp_path.iterdir() if p.is_file()} == {"got", "lines"}


@pytest.mark.parametrize(
    "name", [*NAMES, "state/x", "manifest.json/..", "checkpoints/../manifest.json", "checkpoints"]
)
def test_names_that_lead_elsewhere_are_refused(desk: Desk, tmp_path: Path, name: str) -> None:
    (desk.runs.path / "state").mkdir()
    (desk.runs.path / "state" / "x").write_text("secret")
    with desk.operator("viewer") as viewer:
        code, status = refusal(viewer.artifact, RUN_ID, name, tmp_path / "got")
    assert (code, status) == ("FS-SRV-024", "INVALID_ARGUMENT")
    assert not (tmp_path / "got").exists()


def test_links_out_of_the_folder_are_not_followed(desk: Desk, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "final.safetensors").write_text("secret")
    (desk.runs.path / "log.txt").symlink_to(secret / "final.safetensors")
    (desk.runs.path / "checkpoints").symlink_to(secret)
    os.mkfifo(desk.runs.path / "metrics.jsonl")
    with desk.operator("viewer") as viewer:
        for name in ("log.txt", "final", "checkpoints/final.safetensors", "metrics.jsonl"):
            assert refusal(viewer.artifact, RUN_ID, name, tmp_path / "got")[1] == "NOT_FOUND", name


def test_an_offset_behind_the_end_is_out_of_range(desk: Desk) -> None:
    (desk.runs.path / "log.txt").write_text("abc")
    with desk.operator("viewer") as viewer:
        request = pb.ArtifactRequest(run_id=RUN_ID, name="log.txt", offset=4)
        stream = viewer._link.stream("GetArtifact", lambda: request, lambda chunk: True)
        assert refusal(lambda: stream) == ("FS-SRV-024", "OUT_OF_RANGE")


def test_the_log_is_sent_line_by_line_without_escapes_and_followed_to_the_end(desk: Desk) -> None:
    log = desk.runs.path / "log.txt"
    log.write_text("first\nsecond \x1b[2J\nto")
    with desk.operator("viewer") as viewer:
        assert list(viewer.logs(RUN_ID)) == ["first", "second \\x1b[2J"]
        lines = viewer.logs(RUN_ID, follow=True)
        assert list(itertools.islice(lines, 2)) == ["first", "second \\x1b[2J"]
        with log.open("a") as file:
            file.write("rn\n" + "x" * 100_000 + "\nlast\n")
        desk.runs.end()
        rest = list(lines)
    assert (rest[0], len(rest[1]), rest[2]) == ("torn", 16 * 1024, "last")


def test_the_version_and_the_incarnation_are_told(desk: Desk) -> None:
    from fedsim import __version__

    with desk.operator("viewer") as viewer:
        assert viewer.version() == __version__
        assert viewer._link.call("Version", pb.VersionRequest()).incarnation == 3
