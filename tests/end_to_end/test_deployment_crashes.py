"""The coordinator dies, ends or runs out of space while real clients work; each test names its rows."""

from __future__ import annotations

import shutil
import signal
import sqlite3
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedsim.identity import Key
from fedsim.server.failpoints import KILLED
from fedsim.storage import sha256
from tests.deployed import Deployment, Run, accepted, held, stopped, unsent, until
from tests.deployed_values import large, values_of

pytestmark = pytest.mark.slow

UPLOAD = 12_000_000
"""Bytes of a large update, about: more than is received between two syncs."""


def offset(fleet: Deployment) -> int:
    """Bytes of the unfinished upload of client 1 that are safe on the coordinator's disk."""
    node = Key.load(fleet.home("client-1") / "node.key").node_id
    wanted = 'SELECT max("offset") FROM uploads WHERE node_id = ? AND NOT complete'
    with sqlite3.connect(f"file:{fleet.state / 'fedsim.db'}?mode=ro", uri=True) as database:
        row = database.execute(wanted, (node,)).fetchone()
    return int(row[0] or 0)


def in_mid_upload(fleet: Deployment, *, rounds: int = 1) -> tuple[Run, dict[str, Any]]:
    """A run whose first client has sent more than two thirds of its update, and is held there."""
    values = large(values_of("fedavg", clients=2, rounds=rounds), UPLOAD / 1e6)
    fleet.simulated(values)
    fleet.proxy.up.hold_at = fleet.proxy.up.carried + 9_500_000
    run = fleet.submit(values)
    until(lambda: fleet.proxy.up.held and fleet.proxy.up.waiting, "held in mid-upload")
    until(lambda: offset(fleet) >= 8 << 20, "a first part of the upload safe")
    return run, values


def test_a_killed_coordinator_goes_on_with_answers_that_were_trained_meanwhile(fleet: Deployment) -> None:
    """R1: SIGKILL while clients train; one of them ends its training while nobody listens."""
    fleet.ready(3)
    values = values_of("scaffold", rounds=6)
    (worker,) = until(lambda: fleet.members["client-3"].children, "a warm worker")
    run = fleet.submit(values)
    run.await_round(2)
    with stopped(worker):
        until(lambda: held(fleet, "client-3") and not unsent(fleet, "client-3"), "a task in hand")
        fleet.coordinator.kill()
    until(lambda: unsent(fleet, "client-3"), "an answer without a coordinator")
    fleet.start_coordinator()
    run.assert_as_simulated(values)


def test_an_upload_goes_on_where_the_killed_coordinator_had_it(fleet: Deployment) -> None:
    """R2: SIGKILL during an upload; no byte is sent again below the committed offset."""
    fleet.ready(2)
    run, values = in_mid_upload(fleet)
    safe = offset(fleet)
    fleet.coordinator.kill()
    fleet.proxy.heal()
    before = fleet.proxy.up.carried
    fleet.start_coordinator()
    run.assert_as_simulated(values)
    sent = fleet.proxy.up.carried - before
    assert 0 < sent < UPLOAD + 600_000 - safe
    assert fleet.metric("fedsim_upload_resumes_total") >= 1


@pytest.mark.parametrize("point", ["upload_synced", "object_renamed", "after_accept:2", "before_accept:3"])
def test_a_coordinator_that_dies_around_an_upload_goes_on(fleet: Deployment, point: str) -> None:
    """R2, R3, R5: parts on the disk that no row counts, objects that no answer names, lost replies."""
    fleet.ready(2)
    values = large(values_of("fedavg", clients=2, rounds=2), UPLOAD / 1e6)
    dying = fleet.restart_coordinator(FEDSIM_FAILPOINT=point)
    fleet.await_online("client-1", "client-2")
    # It may die before it has answered whoever submits; the call is repeated until there is an answer.
    with ThreadPoolExecutor(1) as operator:
        submitted = operator.submit(fleet.submit, values)
        assert dying.ended() == KILLED
        fleet.start_coordinator()
        run = submitted.result()
    run.assert_as_simulated(values)
    if point.startswith("after_accept"):
        said = fleet.members["client-1"].said + fleet.members["client-2"].said
        assert "verdict=DUPLICATE" in said


def test_the_first_sigterm_drains_and_the_run_goes_on_later(fleet: Deployment) -> None:
    """R7: health says so first, an upload under way may end, exit code 0."""
    fleet.ready(2)
    run, values = in_mid_upload(fleet, rounds=2)
    with watched_health(fleet) as seen:
        until(lambda: "SERVING" in seen, "SERVING")
        fleet.coordinator.signal(signal.SIGTERM)
        until(lambda: "NOT_SERVING" in seen, "NOT_SERVING")
        assert fleet.coordinator.alive
        fleet.proxy.heal()
        assert fleet.coordinator.ended() == 0, fleet.coordinator.said
    # The client clears it away after its verdict; an upload that was cut off gets none.
    until(lambda: not unsent(fleet, "client-1"), "an upload that got its grace")
    before = fleet.proxy.up.carried
    fleet.start_coordinator()
    run.assert_as_simulated(values)
    # The update of the second round, and nothing of the first one again.
    assert fleet.proxy.up.carried - before < 1.1 * UPLOAD


def test_the_second_sigterm_ends_at_once_and_nothing_is_lost(fleet: Deployment) -> None:
    """R7: SIGTERM twice; an upload under way is cut, the state is consistent."""
    fleet.ready(2)
    run, values = in_mid_upload(fleet)
    fleet.coordinator.signal(signal.SIGTERM)
    until(lambda: "draining" in fleet.coordinator.said, "draining")
    fleet.coordinator.signal(signal.SIGTERM)
    assert fleet.coordinator.ended() == 130, fleet.coordinator.said
    fleet.proxy.heal()
    fleet.start_coordinator()
    run.assert_as_simulated(values)


def test_a_full_disk_keeps_clients_waiting_and_pauses_the_run_until_there_is_space(
    fleet: Deployment,
) -> None:
    """R8: answers wait while nothing can be stored, a state that cannot be written pauses the run."""
    fleet.ready(2)
    small, big = values_of("scaffold", clients=2, rounds=20), large(values_of(clients=2), 4.0)
    with small_disk(fleet, 80):
        fleet.await_online("client-1", "client-2")
        run = fleet.submit(small)
        run.await_round(2)
        names = ("client-1", "client-2")
        with stopped(*(pid for name in names for pid in fleet.members[name].children)):
            until(lambda: all(held(fleet, n) and not unsent(fleet, n) for n in names), "tasks in hand")
            filler = fill(fleet.state, leaving=0)
        until(lambda: any("RESOURCE_EXHAUSTED" in fleet.members[n].said for n in names), "one that waits")
        assert fleet.coordinator.alive
        assert not run.get().over
        filler.unlink()
        run.assert_as_simulated(small)

        # One update is on its way when the others are there: it still fits, the state of the round does not.
        fleet.proxy.up.hold_at = fleet.proxy.up.carried + 2_000_000
        run = fleet.submit(big)
        until(lambda: fleet.proxy.up.held and fleet.proxy.up.waiting, "held in mid-upload")
        until(lambda: accepted(fleet, "client-2", run), "the other update there")
        filler = fill(fleet.state, leaving=4_500_000)
        fleet.proxy.heal()
        # It soon tries again whether there is space: state and reason are those of one moment.
        found = until(lambda: (seen := run.get()).state == "paused" and seen, "paused")
        assert found.detail.startswith("storage: no space left")
        filler.unlink()
        run.assert_as_simulated(big)
        assert not list(fleet.state.glob("objects/*/.writing-*"))
        for file in fleet.state.glob("objects/??/*"):
            assert sha256(file) == file.parent.name + file.name


def test_a_second_coordinator_on_the_same_state_is_refused(fleet: Deployment) -> None:
    """R22: it ends with a sentence that names the owner."""
    fleet.ready(2)
    first = fleet.coordinator
    second = fleet.launch_coordinator(
        FEDSIM_SERVER__SERVER__LISTEN="127.0.0.1:0", FEDSIM_SERVER__SERVER__HTTP="127.0.0.1:0"
    )
    fleet.members["coordinator"] = first
    assert second.ended() == 6
    assert "FS-LED-007" in second.said
    assert str(first.pid) in second.said
    values = values_of("fedavg", clients=2)
    fleet.submit(values).assert_as_simulated(values)


@contextmanager
def watched_health(fleet: Deployment) -> Iterator[list[str]]:
    """What the coordinator says of its health, as it changes."""
    credentials = grpc.ssl_channel_credentials(fleet.ca.read_bytes())
    seen: list[str] = []

    def watch() -> None:
        try:
            for reply in stub.Watch(health_pb2.HealthCheckRequest(service="")):
                seen.append(health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status))
        except grpc.RpcError:
            seen.append("ended")

    with grpc.secure_channel(fleet.address, credentials) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        thread = threading.Thread(target=watch)
        thread.start()
        yield seen
    thread.join(30)


@contextmanager
def small_disk(fleet: Deployment, megabytes: int) -> Iterator[None]:
    """The state folder on a disk with so many megabytes free."""
    state, kept = fleet.state, fleet.folder / "kept"
    fleet.coordinator.stop()
    shutil.copytree(state, kept)
    used = sum(file.stat().st_blocks * 512 for file in kept.rglob("*"))
    size = f"size={used // 1_000_000 + megabytes}m"
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(state)], capture_output=True)
    if done.returncode:
        shutil.rmtree(kept)
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.decode().strip()}")
    try:
        shutil.copytree(kept, state, dirs_exist_ok=True)
        fleet.start_coordinator()

        yield
        fleet.coordinator.stop()
        shutil.rmtree(kept)
        shutil.copytree(state, kept)
    finally:
        fleet.coordinator.kill()
        subprocess.run(["umount", "--lazy", str(state)], check=True)
        shutil.copytree(kept, state, dirs_exist_ok=True)
        shutil.rmtree(kept)


def fill(folder: Path, *, leaving: int) -> Path:
    """Write until so many bytes are free on the disk of `folder`; the file to delete."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file:
        size = 1 << 20
        while size:
            try:
                if shutil.disk_usage(folder).free - leaving < size:
                    raise OSError
                file.write(bytes(size))
            except OSError:
                size //= 2
    return path
