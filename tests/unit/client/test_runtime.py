"""A client at work: tasks, verdicts, breaks, cancellation, restarts and refusals."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
from grpc import StatusCode

from fedsim.client.problems import SupersededError
from fedsim.client.runtime import State
from fedsim.client.worker import WorkerFailed
from fedsim.pb import federation_pb2 as pb
from tests.fake_fleet import FakeFleet
from tests.fake_worker import FakeWorker
from tests.faults import Abort, CutAfter, LoseReply
from tests.small_clients import client, on_loopback, own_key


def test_a_task_is_done_signed_and_handed_in(tmp_path: Path) -> None:
    async def test(fleet: FakeFleet) -> None:
        task = fleet.offer(b"the model", b"a row", attempt=2)
        async with client(fleet, tmp_path / "c", FakeWorker(b"the update")) as c:
            await fleet.until(lambda: task.task_id in fleet.ledger)
            body, _, content = fleet.ledger[task.task_id]
            assert content == b"the update"
            assert (body.run_id, body.attempt, body.upload_id) == (task.run_id, 2, b"")
            assert (body.examples, body.local_steps, body.normaliser) == (100, 4, 4.0)
            assert body.metrics == {"loss": 1.5, "secret": 2.0}
            assert c.worker.seen == [(b"the model", b"a row", None)]
            await c.stop()
        assert fleet.byes == ["stopped"]
        assert list((tmp_path / "c" / "unsent").iterdir()) == []
        assert not (tmp_path / "c" / "held").exists()

    on_loopback(test)


def test_many_tasks_take_one_login_and_two_calls_each(tmp_path: Path) -> None:
    async def test(fleet: FakeFleet) -> None:
        tasks = [fleet.offer(round_index=r) for r in range(20)]
        async with client(fleet, tmp_path / "c"):
            await fleet.until(lambda: len(fleet.ledger) == len(tasks))
        assert list(fleet.ledger) == [task.task_id for task in tasks]
        first = fleet.calls.index("Lease")
        assert fleet.calls[first : first + 40] == ["Lease", "Submit"] * 20
        assert [bool(request.device) for request in fleet.leases[:3]] == [True, False, False]
        assert len({pb.SubmitBody.FromString(a.request.body).key for a in fleet.ledger.values()}) == 20

    on_loopback(test, heartbeat_seconds=600)


def test_large_objects_are_fetched_and_uploaded(tmp_path: Path) -> None:
    async def test(fleet: FakeFleet) -> None:
        model, lent, update = os.urandom(300_000), os.urandom(80_000), os.urandom(400_000)
        task = fleet.offer(model, lent, inline=False)
        fleet.faults["Fetch"].append(CutAfter(1))
        fleet.faults["Upload"].append(CutAfter(2))
        async with client(fleet, tmp_path / "c", FakeWorker(update, in_file=True)) as c:
            await fleet.until(lambda: task.task_id in fleet.ledger)
            assert fleet.ledger[task.task_id].content == update
            assert c.worker.seen == [(model, lent, None)]
            await c.stop()
        assert fleet.received == len(update)
        assert list((tmp_path / "c" / "objects").iterdir()) == []

    on_loopback(test, inline_bytes=1000)


@pytest.mark.parametrize("in_file", [True, False])
def test_what_the_coordinator_takes_inline_decides_how_an_update_travels(
    tmp_path: Path, in_file: bool
) -> None:
    async def test(fleet: FakeFleet) -> None:
        for size in (1000, 1001):
            task = fleet.offer()
            update = os.urandom(size)
            path = tmp_path / f"{size}"
            async with client(fleet, path, FakeWorker(update, in_file=in_file), key=own_key(tmp_path / "c")):
                await fleet.until(lambda task=task: task.task_id in fleet.ledger)  # type: ignore[misc]
            assert fleet.ledger[task.task_id].content == update
            assert bool(fleet.ledger[task.task_id].body.upload_id) == (size > 1000)

    on_loopback(test, inline_bytes=1000)


def test_a_submission_whose_reply_was_lost_is_repeated_byte_for_byte(tmp_path: Path) -> None:
    async def test(fleet: FakeFleet) -> None:
        task = fleet.offer()
        after = fleet.offer()
        fleet.faults["Submit"].append(LoseReply())
        async with client(fleet, tmp_path / "c") as c:
            await fleet.until(lambda: after.task_id in fleet.ledger)
        assert fleet.submits[0] == fleet.submits[1]
        assert task.task_id in fleet.ledger
        assert len(c.worker.jobs) == 2  # nothing was trained twice

    on_loopback(test)


def test_an_answer_survives_the_crash_of_the_client_and_is_sent_byte_for_byte(tmp_path: Path) -> None:
    async def test(fleet: FakeFleet) -> None:
        task = fleet.offer()
        fleet.faults["Submit"].append(LoseReply())
        async with client(fleet, tmp_path / "c", max_retries=0) as c:
            with pytest.raises(Exception, match="cannot be reached"):
                await c.ends()
        worker = FakeWorker()
        async with client(fleet, tmp_path / "c", worker) as c:
            await fleet.until(lambda: len(fleet.submits) == 2)
            await c.stop()
        assert fleet.submits[0] == fleet.submits[1]
        assert worker.jobs == []
        assert list(fleet.ledger) == [task.task_id]
        assert list((tmp_path / "c" / "unsent").iterdir()) == []

    on_loopback(test)


def test_a_large_answer_survives_the_crash_of_the_client_in_the_middle_of_its_upload(tmp_path: Path) -> None:
    async def test(fleet: FakeFleet) -> None:
        update = os.urandom(400_000)
        task = fleet.offer()
        fleet.faults["Upload"].append(CutAfter(3))
        async with client(fleet, tmp_path / "c", FakeWorker(update, in_file=True), max_retries=0) as c:
            with pytest.raises(Exception, match="cannot be reached"):
                await c.ends()
        worker = FakeWorker()
        async with client(fleet, tmp_path / "c", worker):
            await fleet.until(lambda: task.task_id in fleet.ledger)
        assert fleet.ledger[task.task_id].content == update
        assert fleet.received == len(update)
        assert worker.jobs == []

    on_loopback(test, inline_bytes=1000)


def test_a_torn_record_is_dropped_and_its_task_is_done_again(tmp_path: Path) -> None:
    async def test(fleet: FakeFleet) -> None:
        task = fleet.offer()
        fleet.faults["Submit"].append(Abort())
        async with client(fleet, tmp_path / "c", max_retries=0) as c:
            with pytest.raises(Exception, match="cannot be reached"):
                await c.ends()
        record = tmp_path / "c" / "unsent" / task.task_id.hex() / "submit"
        record.write_bytes(record.read_bytes()[:-3])
        worker = FakeWorker()
        async with client(fleet, tmp_path / "c", worker):
            await fleet.until(lambda: task.task_id in fleet.ledger)
        assert len(worker.jobs) == 1

    on_loopback(test)


def test_training_goes_on_while_the_coordinator_is_away(tmp_path: Path) -> None:
    async def test(fleet: FakeFleet) -> None:
        task = fleet.offer()
        worker = FakeWorker()
        worker.go.clear()
        async with client(fleet, tmp_path / "c", worker) as c:
            await worker.started.wait()
            await fleet.down()
            worker.go.set()
            while c.runtime.state != State.SUBMITTING:
                assert c.runtime.state == State.TRAINING
                await asyncio.sleep(0.005)
            await fleet.up()
            await fleet.until(lambda: task.task_id in fleet.ledger)
        assert len(worker.jobs) == 1

    on_loopback(test)


def test_a_client_without_a_coordinator_is_disconnected_and_then_idle(tmp_path: Path) -> None:
    async def test(fleet: FakeFleet) -> None:
        await fleet.down()
        async with client(fleet, tmp_path / "c") as c:
            await asyncio.sleep(0.03)
            assert c.runtime.state == State.DISCONNECTED
            await fleet.up()
            await fleet.until(lambda: len(fleet.leases) > 0)
            assert c.runtime.state == State.IDLE

    on_loopback(test)


def test_the_coordinator_hears_of_the_task_in_hand_as_soon_as_it_is_back(tmp_path: Path) -> None:
    async def test(fleet: FakeFleet) -> None:
        task = fleet.offer()
        worker = FakeWorker()
        worker.go.clear()
        async with client(fleet, tmp_path / "c", worker) as c:
            await worker.started.wait()
            c.connection.heartbeat_seconds = 0.02
            # The first ones may have been sent before there was a task in hand.
            await fleet.until(lambda: any(beat.held for beat in fleet.beats))
            beat = [beat for beat in fleet.beats if beat.held][-1]
            (held,) = beat.held
            assert (held.task_id, held.phase, held.step, held.steps) == (task.task_id, pb.TRAINING, 1, 4)
            assert beat.free_bytes > 0

    on_loopback(test, heartbeat_seconds=0.02)


def test_a_cancelled_task_is_stopped_and_answered_so(tmp_path: Path) -> None:
    async def test(fleet: FakeFleet) -> None:
        task = fleet.offer()
        worker = FakeWorker()
        worker.go.clear()
        async with client(fleet, tmp_path / "c", worker):
            await worker.started.wait()
            fleet.cancelled.add(task.task_id)
            await fleet.until(lambda: len(fleet.fails) == 1)
            assert (fleet.fails[0].task_id, fleet.fails[0].code) == (task.task_id, "cancelled")
            worker.go.set()
            after = fleet.offer()
            await fleet.until(lambda: after.task_id in fleet.ledger)
        assert task.task_id not in fleet.ledger

    on_loopback(test, heartbeat_seconds=0.02)


@pytest.mark.parametrize("code", ["oom", "cuda_oom", "data", "exception", "timeout"])
def test_a_failure_of_the_worker_is_told_and_the_client_goes_on(tmp_path: Path, code: str) -> None:
    async def test(fleet: FakeFleet) -> None:
        task, after = fleet.offer(attempt=1), fleet.offer()
        worker = FakeWorker()
        worker.failure = WorkerFailed(code, "what\n went\x1b[31m wrong", "Traceback: secret path")
        async with client(fleet, tmp_path / "c", worker) as c:
            await fleet.until(lambda: after.task_id in fleet.ledger)
            await c.stop()
        (fail,) = fleet.fails
        assert (fail.task_id, fail.attempt, fail.code) == (task.task_id, 1, code)
        assert fail.text == "what went [31m wrong"
        assert list((tmp_path / "c" / "unsent").iterdir()) == []

    on_loopback(test)


def test_client_state_becomes_current_only_when_it_was_folded(tmp_path: Path) -> None:
    async def test(fleet: FakeFleet) -> None:
        worker = FakeWorker(state=b"state after ")
        async with client(fleet, tmp_path / "c", worker):
            folded = b""
            done = []
            # The first answer is folded, the second is accepted but lost, the third sees the first again.
            for folds in (True, False, True):
                task = fleet.offer(last_folded=folded)
                await fleet.until(lambda task=task: task.task_id in fleet.ledger)  # type: ignore[misc]
                folded = task.task_id if folds else folded
                done.append(task.task_id)
            last = fleet.offer(last_folded=folded)
            await fleet.until(lambda: last.task_id in fleet.ledger)
        states = [seen[2] for seen in worker.seen]
        assert states == [
            None,
            b"state after " + done[0],
            b"state after " + done[0],
            b"state after " + done[2],
        ]

    on_loopback(test)


def test_the_state_of_a_rejected_answer_is_forgotten(tmp_path: Path) -> None:
    async def test(fleet: FakeFleet) -> None:
        worker = FakeWorker(state=b"s")
        fleet.verdict = lambda body: pb.SubmitReply(verdict=pb.REJECTED, reason="non_finite", text="NaN")
        first, after = fleet.offer(), fleet.offer()
        async with client(fleet, tmp_path / "c", worker) as c:
            await fleet.until(lambda: len(worker.jobs) == 2 and fleet.held is None)
            await c.stop()
        assert not list((tmp_path / "c" / "states" / first.run_id).glob("*.safetensors"))
        assert after.task_id not in fleet.ledger
        assert fleet.fails == []  # the verdict has consumed the task

    on_loopback(test)


def test_state_and_identity_survive_a_restart(tmp_path: Path) -> None:
    async def test(fleet: FakeFleet) -> None:
        first = fleet.offer()
        async with client(fleet, tmp_path / "c", FakeWorker(state=b"kept ")) as c:
            await fleet.until(lambda: first.task_id in fleet.ledger)
            node = c.connection.key.node_id
            await c.crash()
        second = fleet.offer(last_folded=first.task_id)
        worker = FakeWorker(state=b"kept ")
        async with client(fleet, tmp_path / "c", worker) as c:
            await fleet.until(lambda: second.task_id in fleet.ledger)
            assert c.connection.key.node_id == node
        assert worker.seen[0][2] == b"kept " + first.task_id

    on_loopback(test)


def test_a_retry_verdict_is_waited_out(tmp_path: Path) -> None:
    async def test(fleet: FakeFleet) -> None:
        replies = [pb.SubmitReply(verdict=pb.RETRY, delay_seconds=0.01)] * 2
        fleet.verdict = lambda body: replies.pop() if replies else pb.SubmitReply(verdict=pb.ACCEPTED)
        task = fleet.offer()
        async with client(fleet, tmp_path / "c"):
            await fleet.until(lambda: task.task_id in fleet.ledger)
        assert len(set(fleet.submits)) == 1
        assert len(fleet.submits) == 3

    on_loopback(test)


def test_an_upload_that_the_coordinator_lost_is_sent_again_before_the_submission(tmp_path: Path) -> None:
    async def test(fleet: FakeFleet) -> None:
        update = os.urandom(5000)

        def forget_once(body: pb.SubmitBody) -> pb.SubmitReply:
            fleet.verdict = lambda body: pb.SubmitReply(verdict=pb.ACCEPTED)
            fleet.uploads.clear()
            return pb.SubmitReply(verdict=pb.RETRY, delay_seconds=0.01)

        fleet.verdict = forget_once
        task = fleet.offer()
        async with client(fleet, tmp_path / "c", FakeWorker(update, in_file=True)):
            await fleet.until(lambda: task.task_id in fleet.ledger)
        assert fleet.ledger[task.task_id].content == update

    on_loopback(test, inline_bytes=1000)


def test_an_answer_that_is_refused_without_a_verdict_does_not_stop_the_client(tmp_path: Path) -> None:
    async def test(fleet: FakeFleet) -> None:
        fleet.faults["Submit"].append(Abort(StatusCode.PERMISSION_DENIED, "not your task"))
        task, after = fleet.offer(), fleet.offer()
        async with client(fleet, tmp_path / "c"):
            await fleet.until(lambda: after.task_id in fleet.ledger)
        assert [fail.task_id for fail in fleet.fails] == [task.task_id]
        assert "not your task" in fleet.fails[0].text

    on_loopback(test)


def test_a_superseded_client_stops_its_training_and_ends(tmp_path: Path) -> None:
    async def test(fleet: FakeFleet) -> None:
        key = own_key(tmp_path / "older")
        fleet.offer()
        worker = FakeWorker()
        worker.go.clear()
        async with client(fleet, tmp_path / "older", worker, key=key) as older:
            await worker.started.wait()
            async with client(fleet, tmp_path / "newer", key=key) as newer:
                with pytest.raises(SupersededError):
                    await older.ends()
                await fleet.until(lambda: len(fleet.ledger) == 1)
                assert not newer.done.done()

    on_loopback(test, heartbeat_seconds=0.05)


def test_stopping_in_mid_training_keeps_the_task_and_says_goodbye(tmp_path: Path) -> None:
    async def test(fleet: FakeFleet) -> None:
        model = os.urandom(100_000)
        task = fleet.offer(model, inline=False)
        worker = FakeWorker()
        worker.go.clear()
        async with client(fleet, tmp_path / "c", worker) as c:
            await worker.started.wait()
            await c.stop()
        assert fleet.byes == ["stopped"]
        assert fleet.fails == []
        assert pb.Task.FromString((tmp_path / "c" / "held").read_bytes()) == task
        async with client(fleet, tmp_path / "c") as c:
            await fleet.until(lambda: task.task_id in fleet.ledger)
        assert fleet.calls.count("Fetch") == 1  # the model was still there

    on_loopback(test)


def test_a_client_that_is_told_to_stop_while_it_is_alone_ends_at_once(tmp_path: Path) -> None:
    async def test(fleet: FakeFleet) -> None:
        await fleet.down()
        async with client(fleet, tmp_path / "c") as c:
            await asyncio.sleep(0.02)
            await c.stop()

    on_loopback(test)


def test_the_process_that_talks_to_the_coordinator_does_not_load_torch() -> None:
    code = "import sys, fedsim.client.main; print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "False"
