"""Objects in chunks, down and up, over broken streams and restarts."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from grpc import StatusCode

from fedsim.client.problems import CoordinatorProblem
from fedsim.client.statuses import Refused
from fedsim.client.transfer import BadObject, Unwanted, fetch, upload
from fedsim.pb import federation_pb2 as pb
from tests.fake_fleet import FakeFleet
from tests.faults import Abort, CutAfter, Damage, Hang, Lie
from tests.small_clients import connected, on_loopback


def test_a_broken_download_goes_on_where_it_stopped(tmp_path: Path) -> None:
    async def test(fleet: FakeFleet) -> None:
        content = os.urandom(300_000)
        task = fleet.offer(content, inline=False)
        fleet.faults["Fetch"].extend([CutAfter(2), Damage(1), CutAfter(0)])
        async with connected(fleet, tmp_path / "c") as link:
            path = await fetch(link, task.message, tmp_path / "object")
        assert path.read_bytes() == content
        chunk = 64 << 10
        assert fleet.sent == [0, 2 * chunk, 3 * chunk, 3 * chunk]

    on_loopback(test)


def test_a_download_goes_on_in_the_next_process(tmp_path: Path) -> None:
    async def test(fleet: FakeFleet) -> None:
        content = os.urandom(300_000)
        task = fleet.offer(content, inline=False)
        (tmp_path / "object.part").write_bytes(content[:100_000])
        async with connected(fleet, tmp_path / "c") as link:
            path = await fetch(link, task.message, tmp_path / "object")
        assert path.read_bytes() == content
        assert fleet.sent == [100_000]

    on_loopback(test)


def test_a_download_with_another_digest_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    async def test(fleet: FakeFleet) -> None:
        task = fleet.offer(os.urandom(200_000), inline=False)
        fleet.faults["Fetch"].append(Lie())
        async with connected(fleet, tmp_path / "c") as link:
            with pytest.raises(BadObject, match="SHA-256"):
                await fetch(link, task.message, tmp_path / "object")
        assert not list(tmp_path.glob("object*"))

    on_loopback(test)


def test_a_download_that_is_longer_than_the_task_says_is_refused(tmp_path: Path) -> None:
    async def test(fleet: FakeFleet) -> None:
        content = os.urandom(200_000)
        short = pb.Object(digest=hashlib.sha256(content).digest(), size=100_000)
        fleet.offer(content, inline=False)
        async with connected(fleet, tmp_path / "c") as link:
            with pytest.raises(BadObject):
                await fetch(link, short, tmp_path / "object")

    on_loopback(test)


def test_a_download_that_stands_still_is_taken_up_again(tmp_path: Path) -> None:
    async def test(fleet: FakeFleet) -> None:
        content = os.urandom(100_000)
        task = fleet.offer(content, inline=False)
        fleet.faults["Fetch"].append(Hang())
        async with connected(fleet, tmp_path / "c") as link:
            path = await fetch(link, task.message, tmp_path / "object", idle_seconds=0.05)
        assert path.read_bytes() == content

    on_loopback(test)


def test_a_download_ends_when_the_task_is_cancelled(tmp_path: Path) -> None:
    async def test(fleet: FakeFleet) -> None:
        task = fleet.offer(os.urandom(300_000), inline=False)
        seen: list[int] = []
        async with connected(fleet, tmp_path / "c") as link:
            with pytest.raises(Unwanted):
                await fetch(
                    link, task.message, tmp_path / "o", on_bytes=seen.append, cancelled=lambda: len(seen) > 1
                )
        assert len(seen) == 2

    on_loopback(test)


def _start(content: bytes) -> pb.UploadStart:
    digest = hashlib.sha256(content).digest()
    return pb.UploadStart(
        upload_id=os.urandom(16), task_id=os.urandom(16), object=pb.Object(digest=digest, size=len(content))
    )


def test_a_broken_upload_resends_no_byte_that_is_safe(tmp_path: Path) -> None:
    async def test(fleet: FakeFleet) -> None:
        content = os.urandom(500_000)
        (tmp_path / "update").write_bytes(content)
        start = _start(content)
        fleet.faults["Upload"].extend([CutAfter(3), CutAfter(2)])
        async with connected(fleet, tmp_path / "c") as link:
            await upload(link, start, tmp_path / "update", resumed=False)
        stored = fleet.uploads[start.upload_id]
        assert bytes(stored.content) == content
        assert stored.complete
        assert stored.generation == 3  # each stream fences the one before
        assert fleet.received == len(content)

    on_loopback(test)


def test_an_upload_goes_on_in_the_next_process(tmp_path: Path) -> None:
    async def test(fleet: FakeFleet) -> None:
        content = os.urandom(500_000)
        (tmp_path / "update").write_bytes(content)
        start = _start(content)
        fleet.faults["Upload"].append(CutAfter(3))
        async with connected(fleet, tmp_path / "c", max_retries=0) as link:
            await link.start()
            with pytest.raises(CoordinatorProblem):
                await upload(link, start, tmp_path / "update", resumed=False)
        async with connected(fleet, tmp_path / "c") as link:
            await upload(link, start, tmp_path / "update", resumed=True)
            await upload(link, start, tmp_path / "update", resumed=True)  # nothing is left to do
        assert bytes(fleet.uploads[start.upload_id].content) == content
        assert fleet.received == len(content)

    on_loopback(test)


def test_an_upload_whose_reply_was_lost_is_not_sent_again(tmp_path: Path) -> None:
    async def test(fleet: FakeFleet) -> None:
        content = os.urandom(200_000)
        (tmp_path / "update").write_bytes(content)
        start = _start(content)
        async with connected(fleet, tmp_path / "c") as link:
            await upload(link, start, tmp_path / "update", resumed=False)
            await upload(link, start, tmp_path / "update", resumed=True)
        assert fleet.received == len(content)
        assert fleet.calls.count("Upload") == 1

    on_loopback(test)


def test_a_file_that_changed_after_it_was_signed_is_not_handed_in(tmp_path: Path) -> None:
    async def test(fleet: FakeFleet) -> None:
        content = os.urandom(200_000)
        (tmp_path / "update").write_bytes(bytes(len(content)))
        async with connected(fleet, tmp_path / "c") as link:
            with pytest.raises(BadObject, match="changed"):
                await upload(link, _start(content), tmp_path / "update", resumed=False)

    on_loopback(test)


def test_an_upload_that_the_coordinator_keeps_refusing_is_given_up(tmp_path: Path) -> None:
    async def test(fleet: FakeFleet) -> None:
        content = os.urandom(100_000)
        (tmp_path / "update").write_bytes(content)
        fleet.faults["Upload"].extend([Abort(StatusCode.FAILED_PRECONDITION, "fenced")] * 20)
        async with connected(fleet, tmp_path / "c") as link:
            with pytest.raises(Refused, match="fenced"):
                await upload(link, _start(content), tmp_path / "update", resumed=False)

    on_loopback(test)
