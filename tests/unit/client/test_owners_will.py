"""What a client refuses while it works: foreign offers, other bytes than were signed, its owner's limits."""

from __future__ import annotations

import asyncio
import os
from datetime import datetime
from pathlib import Path

import pytest

from fedsim.client import runtime as module
from fedsim.errors import EnvironmentProblem
from fedsim.identity import Key
from fedsim.storage import problem
from tests.fake_fleet import FakeFleet, local
from tests.small_clients import OPEN_POLICY, client, on_loopback


def test_an_offer_that_is_not_signed_by_the_coordinator_is_refused(tmp_path: Path) -> None:
    async def test(fleet: FakeFleet) -> None:
        fleet.offer(signer=Key.new())
        async with client(fleet, tmp_path / "c") as c:
            audit = tmp_path / "c" / "audit.jsonl"
            await fleet.until(lambda: len(fleet.leases) > 3)
            assert "not signed by the coordinator" in audit.read_text()
            assert c.worker.jobs == []

    on_loopback(test)


@pytest.mark.parametrize("inline", [True, False])
def test_a_model_with_another_digest_than_the_signed_task_says_is_refused(
    tmp_path: Path, inline: bool
) -> None:
    async def test(fleet: FakeFleet) -> None:
        fleet.offer(b"the true model", inline=inline)
        for digest in fleet.objects:
            fleet.objects[digest] = b"another  model"
        if inline:
            fleet.offers[0].message = b"another  model"
        after = fleet.offer()
        async with client(fleet, tmp_path / "c") as c:
            await fleet.until(lambda: after.task_id in fleet.ledger)
            assert len(c.worker.jobs) == 1
        assert [fail.code for fail in fleet.fails] == ["exception"]
        assert "SHA-256" in fleet.fails[0].text
        assert "refused" in (tmp_path / "c" / "audit.jsonl").read_text()

    on_loopback(test)


def test_without_a_policy_everything_is_refused(tmp_path: Path) -> None:
    async def test(fleet: FakeFleet) -> None:
        fleet.offer()
        async with client(fleet, tmp_path / "c", policy=None) as c:
            await fleet.until(lambda: len(fleet.fails) == 1)
            assert c.worker.jobs == []
        assert fleet.fails[0].code == "policy_refused"
        assert "policy" in fleet.fails[0].text
        assert '"policy_refused"' in (tmp_path / "c" / "audit.jsonl").read_text()

    on_loopback(test)


@pytest.mark.parametrize(
    ("extra", "task", "word"),
    [
        ("[limits]\nmin_batch_size = 8", {"local": local(batch_size=1)}, "min_batch_size"),
        ("[limits]\nmax_local_steps = 1000", {"local": local(steps=10**9)}, "max_local_steps"),
        ("[limits]\nmax_local_steps = 1000", {"steps": 10**9}, "max_local_steps"),
        ("[limits]\nmax_local_steps = 20", {"local": local(epochs=4)}, "max_local_steps"),
        ("[privacy]\nmin_noise_multiplier = 0.8", {}, "min_noise_multiplier"),
        ('[limits]\nschemas = ["other"]', {}, "schemas"),
        ("[limits]\nmin_examples = 101", {}, "min_examples"),
    ],
)
def test_what_the_owner_does_not_allow_is_refused_and_written_down(
    tmp_path: Path, extra: str, task: dict[str, object], word: str
) -> None:
    async def test(fleet: FakeFleet) -> None:
        refused = fleet.offer(**task)
        async with client(fleet, tmp_path / "c", policy=OPEN_POLICY + extra) as c:
            await fleet.until(lambda: len(fleet.fails) == 1)
            assert c.worker.jobs == []
        assert fleet.fails[0].code == "policy_refused"
        assert word in fleet.fails[0].text
        assert refused.task_id.hex() in (tmp_path / "c" / "audit.jsonl").read_text()

    on_loopback(test)


def test_a_policy_that_becomes_stricter_acts_on_the_next_task(tmp_path: Path) -> None:
    async def test(fleet: FakeFleet) -> None:
        task = fleet.offer()
        async with client(fleet, tmp_path / "c"):
            await fleet.until(lambda: task.task_id in fleet.ledger)
            (tmp_path / "c" / "policy.toml").write_text("[runs]\nnames = []\n")
            fleet.offer()
            await fleet.until(lambda: len(fleet.fails) == 1)
            (tmp_path / "c" / "policy.toml").write_text("[runs\n")
            fleet.offer()
            await fleet.until(lambda: len(fleet.fails) == 2)
        assert {fail.code for fail in fleet.fails} == {"policy_refused"}

    on_loopback(test)


def test_only_the_metrics_that_may_leave_leave(tmp_path: Path) -> None:
    async def test(fleet: FakeFleet) -> None:
        task = fleet.offer()
        policy = OPEN_POLICY + '[limits]\nmetrics = ["lo*"]'
        async with client(fleet, tmp_path / "c", policy=policy):
            await fleet.until(lambda: task.task_id in fleet.ledger)
        assert fleet.ledger[task.task_id].body.metrics == {"loss": 1.5}

    on_loopback(test)


def test_outside_its_hours_a_client_has_no_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_NIGHT_STEP", 0.01)
    hour = [21]

    async def test(fleet: FakeFleet) -> None:
        policy = OPEN_POLICY + '[hours]\nfrom = "20:00"\nto = "06:00"'
        task = fleet.offer()
        now = lambda: datetime(2026, 1, 1, hour[0])  # noqa: E731
        async with client(fleet, tmp_path / "c", policy=policy, now=now):
            await fleet.until(lambda: task.task_id in fleet.ledger)
            hour[0] = 12
            await fleet.until(lambda: len(fleet.byes) == 1)
            calls = len(fleet.calls)
            fleet.offer()
            await asyncio.sleep(0.1)
            assert len(fleet.calls) == calls
            hour[0] = 23
            await fleet.until(lambda: len(fleet.ledger) == 2)
        assert fleet.calls.count("Login") == 2

    on_loopback(test)


def test_the_examples_of_a_run_are_counted_once(tmp_path: Path) -> None:
    async def test(fleet: FakeFleet) -> None:
        for _ in range(3):
            fleet.offer()
        policy = OPEN_POLICY + "[limits]\nmin_examples = 100"
        async with client(fleet, tmp_path / "c", policy=policy) as c:
            await fleet.until(lambda: len(fleet.ledger) == 3)
            assert c.worker.asked == 1

    on_loopback(test)


def test_a_full_disk_fails_the_task_and_not_the_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(fleet: FakeFleet) -> None:
        task, after = fleet.offer(), fleet.offer()
        async with client(fleet, tmp_path / "c") as c:
            write = c.folder.unsent.write

            def full(*arguments: object) -> object:
                monkeypatch.setattr(c.folder.unsent, "write", write)
                raise problem(OSError(28, "No space left on device"), tmp_path)

            monkeypatch.setattr(c.folder.unsent, "write", full)
            await fleet.until(lambda: after.task_id in fleet.ledger)
        assert [fail.task_id for fail in fleet.fails] == [task.task_id]
        assert "disk is full" in fleet.fails[0].text

    on_loopback(test)


def test_two_processes_cannot_use_one_folder(tmp_path: Path) -> None:
    async def test(fleet: FakeFleet) -> None:
        async with client(fleet, tmp_path / "c"):
            with pytest.raises(EnvironmentProblem) as raised:
                async with client(fleet, tmp_path / "c"):
                    pass
        assert raised.value.code == "FS-CLI-008"
        assert f"process {os.getpid()}" in str(raised.value)

    on_loopback(test)
