"""Lines of the log carry what they are about, and each run's own file holds that run's lines."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedsim.identity import Key
from fedsim.pb import federation_pb2 as pb
from fedsim.runs.folder import LOG, RunFolder
from fedsim.server.logs import start_logging, stop_logging
from tests.fake_runs import update_bundle
from tests.fleet import Coordinator, make_nodes, toml_of
from tests.fleet_server import Service, run
from tests.wired import config


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """The log of a coordinator as JSON."""
    root, own = logging.getLogger(), logging.getLogger("fedsim")
    levels = root.level, own.level
    stream = io.StringIO()
    handler = start_logging("json", "info", stream=stream)
    yield stream
    stop_logging(handler)
    root.setLevel(levels[0])
    own.setLevel(levels[1])


def records(written: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in written.getvalue().splitlines()]


def test_every_round_is_a_line_with_its_run_and_each_run_has_its_own_log(
    tmp_path: Path, written: io.StringIO
) -> None:
    values = config(output={"report": False, "plots": False}, deployment={"min_clients": 4})
    values["run"]["rounds"] = 2
    coordinator = Coordinator(tmp_path / "state", Key.new(), make_nodes(tmp_path, 4)).start()
    ids = [coordinator.runs.submit(toml_of(values), "run", key, "").run_id for key in ("a", "b")]
    assert [coordinator.serve(run_id) for run_id in ids] == ["ok", "ok"]
    coordinator.stop()
    committed = [r for r in records(written) if r["event"].startswith("committed")]
    assert sorted((r["run"], r["round"]) for r in committed) == sorted((i, n) for i in ids for n in range(3))
    assert all(r["dur_ms"] > 0 for r in committed)
    for run_id in ids:
        folder = RunFolder(coordinator.runs.folder(run_id))
        lines = (folder.path / LOG).read_text().splitlines()
        assert [line.partition("committed: ")[2].split()[0] for line in lines[:3]] == [
            "round=0",
            "round=1",
            "round=2",
        ]
        assert lines[3].endswith("the run is ok")
        assert len(lines) == 4
        assert folder.changed_files() == {}


def test_what_goes_wrong_with_a_task_names_run_round_node_and_task(
    tmp_path: Path, written: io.StringIO
) -> None:
    async def scenario(service: Service) -> list[tuple[str, str]]:
        nodes = [service.node() for _ in range(3)]
        tasks = [service.runs.put(node.node_id) for node in nodes]
        for node in nodes:
            await node.call("Lease", pb.LeaseRequest())
        failed, refused, silent = tasks
        fail = pb.FailRequest(task_id=failed.task_id, code="oom", text="x\x1b[2J\nforged")
        for _ in range(2):
            await nodes[0].call("Fail", fail)
        assert (await nodes[1].submit(refused, update_bundle(5))).verdict == pb.REJECTED
        service.fleet.leases._held[silent.task_id].ends -= 1_000
        service.fleet.look_after(60.0)
        return [(task.node_id, task.task_id.hex()) for task in tasks]

    expected = run(tmp_path, scenario)
    found = records(written)
    assert [(r["event"].split(":")[0], r["node"], r["task"]) for r in found] == [
        ("a task failed", *expected[0]),
        ("an update is refused", *expected[1]),
        ("a lease is over", *expected[2]),
    ]
    assert {(r["run"], r["round"]) for r in found} == {("0123456789ab", 1)}
    assert found[0]["event"] == "a task failed: oom: x\\x1b[2J\\nforged"
    assert found[1]["event"].startswith("an update is refused: schema: ")
