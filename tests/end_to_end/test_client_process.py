"""`fedsim client` as a process: how it ends, and with which code."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path

import pytest

from fedsim.identity import Key
from tests.fake_fleet import FakeFleet
from tests.small_clients import connected

pytestmark = pytest.mark.slow


async def started(fleet: FakeFleet, state: Path, *more: str) -> Process:
    """A client process that has asked for work."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "fedsim", "client", "--server", fleet.address, "--insecure",
        "--state", str(state), "--device", "cpu", *more,
        stderr=PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    before = len(fleet.leases)
    await fleet.until(lambda: len(fleet.leases) > before, seconds=60)
    return process


async def ended(process: Process) -> tuple[int | None, str]:
    async with asyncio.timeout(60):
        _, said = await process.communicate()
    return process.returncode, said.decode()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_ends_a_client_politely(tmp_path: Path, number: signal.Signals) -> None:
    async def main() -> None:
        async with FakeFleet() as fleet:
            process = await started(fleet, tmp_path / "c")
            process.send_signal(number)
            code, said = await ended(process)
            assert (code, fleet.byes) == (0, ["stopped"]), said
            assert "Traceback" not in said
            assert (tmp_path / "c" / "node.key").stat().st_mode & 0o777 == 0o600

    asyncio.run(main())


def test_a_superseded_client_ends_with_a_code_of_its_own(tmp_path: Path) -> None:
    async def main() -> None:
        async with FakeFleet(heartbeat_seconds=0.1) as fleet:
            process = await started(fleet, tmp_path / "c")
            key = Key.load(tmp_path / "c" / "node.key")
            async with connected(fleet, tmp_path / "d", key=key) as newer:
                await newer.start()
                code, said = await ended(process)
            assert code == 7, said
            assert "FS-CLI-003" in said

    asyncio.run(main())


def test_a_client_that_is_not_let_in_ends_with_3(tmp_path: Path) -> None:
    async def main() -> None:
        async with FakeFleet() as fleet:
            fleet.token = "needed"
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "fedsim", "client", "--server", fleet.address, "--insecure",
                "--state", str(tmp_path / "c"), "--device", "cpu", stderr=PIPE,
            )  # fmt: skip
            code, said = await ended(process)
            assert code == 3, said
            assert "FS-CLI-001" in said

    asyncio.run(main())
