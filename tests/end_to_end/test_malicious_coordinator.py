"""A coordinator that means harm, and real clients: what their owners did not allow is refused and audited.

The runtime, its policy, its state folder and the wire are real. Where a task must not even be looked at, a
fake worker notices that it was; where building it is the danger, the code of the real worker does the task.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedsim import wire
from fedsim.bundle import encode
from fedsim.client.data import Source
from fedsim.client.job import Answer, Facts, Job
from fedsim.client.problems import CoordinatorProblem
from fedsim.client.train import Trainee
from fedsim.client.worker import WorkerFailed
from fedsim.config import from_dict
from fedsim.errors import FedsimError
from fedsim.identity import Key
from fedsim.pb import federation_pb2 as pb
from tests.fake_fleet import FakeFleet, local, task_config
from tests.fake_worker import FakeWorker
from tests.faults import Damage, Lie
from tests.hostile import few
from tests.hostile_bundles import BOMBS
from tests.small_clients import OPEN_POLICY, client, connected, on_loopback
from tests.wired import config

STRICT = (
    OPEN_POLICY.replace('strategies = ["*"]', 'strategies = ["fedavg"]')
    .replace('models = ["*"]', 'models = ["mlp"]')
    .replace('datasets = ["*"]', 'datasets = ["digits"]')
    .replace('names = ["*"]', 'names = ["digits-*"]')
    + """
[limits]
min_batch_size = 8
min_examples = 50
max_local_steps = 1000
max_local_epochs = 5
max_upload_bytes = "1MiB"
schemas = ["5c4e"]
"""
)
HUGE = [pb.TensorSpec(name="vectors/delta", dtype="F32", shape=[10**9])]

DEMANDS: dict[str, tuple[dict[str, Any], str]] = {
    "batches of 1": ({"local": local(batch_size=1)}, "min_batch_size"),
    "negative batches": ({"local": local(batch_size=-5)}, "batch size"),
    "1e9 steps": ({"steps": 10**9}, "max_local_steps"),
    "1e9 steps of the run": ({"local": local(steps=10**9)}, "max_local_steps"),
    "1e9 epochs": ({"local": local(epochs=10**9)}, "max_local_epochs"),
    "2^63-1 steps": ({"steps": 2**63 - 1}, "max_local_steps"),
    "another architecture": ({"schema": "trap"}, "schemas"),
    "another model": ({"config": task_config(model="imprint")}, "models"),
    "a model that is code": ({"config": task_config(model="os:system")}, "models"),
    "another strategy": ({"config": task_config(strategy="unknown")}, "strategies"),
    "other data": ({"config": task_config(dataset="../../../home")}, "datasets"),
    "another run": ({"run_name": "../../x"}, "names"),
    "a large answer": ({"update": HUGE}, "max_upload_bytes"),
}


@pytest.mark.parametrize(
    "demand", few(DEMANDS, "batches of 1", "1e9 steps", "another architecture", "a model that is code")
)
def test_what_the_policy_does_not_allow_is_refused_with_a_line_in_the_audit_log(
    tmp_path: Path, demand: str
) -> None:
    """S20: before anything of the task is fetched or built; the next honest task is done."""
    fields, word = DEMANDS[demand]

    async def test(fleet: FakeFleet) -> None:
        refused, honest = fleet.offer(inline=False, **fields), fleet.offer()
        async with client(fleet, tmp_path / "c", policy=STRICT) as c:
            await fleet.until(lambda: honest.task_id in fleet.ledger)
            assert len(c.worker.jobs) == 1
        assert [(fail.task_id, fail.code) for fail in fleet.fails] == [(refused.task_id, "policy_refused")]
        assert word in fleet.fails[0].text
        assert fleet.sent == []  # nothing was fetched
        (line,) = [line for line in audit(tmp_path / "c") if line["action"] == "policy_refused"]
        assert line["task"] == refused.task_id.hex()
        assert word in line["reason"]

    on_loopback(test)


def audit(folder: Path) -> list[dict[str, Any]]:
    """The lines of a client's audit log."""
    return [json.loads(line) for line in (folder / "audit.jsonl").read_text().splitlines()]


def test_without_noise_where_the_owner_wants_some_nothing_is_trained(tmp_path: Path) -> None:
    """S20: none, too little, not a number, and a clipping norm that hides nothing."""
    policy = OPEN_POLICY + "[privacy]\nmin_noise_multiplier = 0.8\nmax_clip = 1.0\n"
    tables = json.loads(task_config())
    privacy: list[Any] = [None, {}, {"noise_multiplier": 0.0}, {"noise_multiplier": 0.79, "clip_norm": 1.0},
               {"noise_multiplier": float("nan"), "clip_norm": 1.0}, {"noise_multiplier": 1.0},
               {"noise_multiplier": 1.0, "clip_norm": 1e9}, {"noise_multiplier": 1.0, "clip_norm": -1.0},
               {"noise_multiplier": "1.0", "clip_norm": 1.0}, []]  # fmt: skip

    async def test(fleet: FakeFleet) -> None:
        for one in privacy:
            fleet.offer(config=json.dumps({**tables, "privacy": one}).encode())
        async with client(fleet, tmp_path / "c", policy=policy) as c:
            await fleet.until(lambda: len(fleet.fails) == len(privacy))
            assert c.worker.jobs == []
        assert {fail.code for fail in fleet.fails} <= {"policy_refused", "exception"}
        assert sum(fail.code == "policy_refused" for fail in fleet.fails) >= len(privacy) - 1

    on_loopback(test)


MALFORMED: dict[str, dict[str, Any]] = {
    "no JSON": {"config": b"\xff\xfe"},
    "deep JSON": {"config": b"[" * 100_000},
    "a list": {"config": b"[]"},
    "names that are no text": {"config": json.dumps({"strategy": {"name": ["fedavg"]}}).encode()},
    "steps that are no number": {"local": b'{"steps": "many", "batch_size": 8, "epochs": 1}'},
    "a path for a run": {"run_id": "../../../x"},
    "no task id": {"task_id": b""},
    "a client beyond the population": {"client": 2**64 - 1},
    "another coordinator": {"server_id": bytes(32)},
    "an unknown type": {"update": [pb.TensorSpec(name="vectors/delta", dtype="C64", shape=[1])]},
}


@pytest.mark.parametrize("kind", few(MALFORMED, "deep JSON", "a path for a run", "another coordinator"))
def test_a_task_that_is_malformed_is_refused_and_the_client_goes_on(tmp_path: Path, kind: str) -> None:
    """S20: signed by the right key, and still nothing that a task can be."""

    async def test(fleet: FakeFleet) -> None:
        fleet.offer(**MALFORMED[kind])
        async with client(fleet, tmp_path / "c") as c:
            await fleet.until(lambda: len(fleet.leases) > 2)
            fleet.held = None  # as a coordinator that gives up
            honest = fleet.offer()
            await fleet.until(lambda: honest.task_id in fleet.ledger)
            assert len(c.worker.jobs) == 1
        assert not (tmp_path / "x").exists()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "c.key"]

    on_loopback(test)


# Downloads


@pytest.mark.parametrize("kind", ["lie", "damage", "longer", "unsigned", "older"])
def test_what_is_not_what_the_coordinator_signed_is_refused(tmp_path: Path, kind: str) -> None:
    """S21: other bytes with right checksums, damaged ones, more than promised, another signature."""

    async def test(fleet: FakeFleet) -> None:
        model = b"m" * 100_000
        bad = fleet.offer(model, inline=False, signer=Key.new() if kind == "unsigned" else None)
        if kind == "lie":
            fleet.faults["Fetch"].extend([Lie()] * 20)
        elif kind == "damage":
            fleet.faults["Fetch"].extend([Damage(0)] * 3)
        elif kind == "longer":
            fleet.objects[bad.message.digest] = model + b"more"
        elif kind == "older":
            fleet.offers[0].message = b"the model of yesterday"
        async with client(fleet, tmp_path / "c") as c:
            if kind == "damage":  # of a link: taken up again until it is right
                await fleet.until(lambda: bad.task_id in fleet.ledger)
                assert c.worker.seen[0][0] == model
                return
            if kind == "unsigned":
                await fleet.until(lambda: len(fleet.leases) > 2)
                fleet.held = None
            honest = fleet.offer()
            await fleet.until(lambda: honest.task_id in fleet.ledger)
            assert [job.message for job in c.worker.jobs] == [b"model"]
        assert bad.task_id not in fleet.ledger
        refused = [line for line in audit(tmp_path / "c") if line["action"].endswith("_refused")]
        assert len(refused) >= 1

    on_loopback(test)


def test_a_coordinator_that_went_back_in_time_is_left(tmp_path: Path) -> None:
    """S21: a copy of an older state, and another identity under the same address."""
    folder = tmp_path / "c"

    async def test(fleet: FakeFleet) -> None:
        fleet.incarnation = 7
        async with connected(fleet, folder) as first:
            await first.start()
        fleet.incarnation = 6
        async with connected(fleet, folder) as second:
            with pytest.raises(CoordinatorProblem) as older:
                await second.start()
        assert "7" in str(older.value)
        fleet.incarnation, fleet.key = 8, Key.new()
        async with connected(fleet, folder) as third:
            with pytest.raises(CoordinatorProblem):
                await third.start()
        assert fleet.calls.count("Login") == 1

    on_loopback(test)


# What the real worker builds, under a policy that allows every name


class InThisProcess(FakeWorker):
    """Does what a worker does, without a process of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.trainee = Trainee(Source())

    async def train(self, job: Job, on_progress: Callable[[int, int], None]) -> Answer:
        self.jobs.append(job)
        try:
            return self.trainee.train(job)
        except (FedsimError, ValueError, KeyError, TypeError) as error:
            raise WorkerFailed("exception", str(error)) from error

    async def facts(self, config: bytes, client: int, population: int) -> Facts:
        return Facts(self.trainee.examples(config, client, population))


GOOD: dict[str, Any] = json.loads(wire.client_config(from_dict(config())))
PLANTED = "planted_by_a_coordinator"


def changed(**tables: dict[str, Any]) -> bytes:
    """The configuration of an honest run with other keys; None takes one away."""
    values = json.loads(json.dumps(GOOD))
    for name, table in tables.items():
        values.setdefault(name, {}).update(table)
        values[name] = {key: value for key, value in values[name].items() if value is not None}
    return json.dumps(values).encode()


CODE: dict[str, bytes] = {
    "a model as target": changed(model={"name": "mlp", "target": f"{PLANTED}:build"}),
    "a target alone": changed(model={"name": None, "hidden": None, "target": f"{PLANTED}:build"}),
    "a target for a name": changed(model={"name": f"{PLANTED}:build", "hidden": None}),
    "a target with parameters": changed(
        model={"name": "os:system", "hidden": None, "command": "touch owned"}
    ),
    "a strategy as target": changed(strategy={"name": f"{PLANTED}:build"}),
    "a strategy by its path": changed(strategy={"name": f"{PLANTED}.build"}),
    "data as target": changed(data={"name": f"{PLANTED}:build"}),
    "a partitioner as target": changed(data={"partition": {"kind": f"{PLANTED}:build", "clients": 4}}),
    "a file of data": changed(data={"name": "mnist", "path": "/etc", "clients": None}),
    "a table of data": changed(data={"name": "tabular", "path": "/etc/passwd", "target": "x"}),
    "a file of weights": changed(model={"weights": "/etc/passwd"}),
    "an unknown model": changed(model={"name": "no-such-model"}),
    "an unknown strategy": changed(strategy={"name": "no-such-strategy"}),
    "an unknown key": changed(client={"callback": f"{PLANTED}:build"}),
}


@pytest.mark.parametrize(
    "kind",
    few(CODE, "a target for a name", "a target with parameters", "a strategy as target", "a file of weights"),
)
def test_no_name_in_a_task_leads_to_code_or_files_of_the_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """S20: even where the owner allows every plugin, only installed plugins are found."""
    owned = tmp_path / "owned"
    (tmp_path / f"{PLANTED}.py").write_text(
        f"from pathlib import Path\nPath({str(owned)!r}).touch()\n\n\ndef build(**parameters):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    local_spec = json.dumps({"batch_size": 4, "epochs": 1, "steps": None, "lr": 0.1}).encode()
    worker = InThisProcess()

    async def test(fleet: FakeFleet) -> None:
        message = encode({})
        task = fleet.offer(message, config=CODE[kind], local=local_spec, population=4, schema="")
        async with client(fleet, tmp_path / "c", worker):
            await fleet.until(lambda: len(fleet.fails) == 1)
        assert fleet.fails[0].task_id == task.task_id
        # FS-CLI-048 names a path, FS-REG-001 an unknown plugin, FS-CFG-004 and 006 a key.
        assert re.search(r"FS-(CLI-048|REG-001|CFG-00[46])|KeyError: 'name'", fleet.fails[0].text)
        assert fleet.ledger == {}

    on_loopback(test)
    assert not owned.exists()
    assert PLANTED not in sys.modules


@pytest.mark.parametrize("kind", few(BOMBS, "a header of 1 GB", "a pickle"))
def test_a_broadcast_that_is_no_bundle_is_refused(tmp_path: Path, kind: str) -> None:
    """S5, S8, S20: the reader of a client is the strict one of the coordinator."""
    content = BOMBS[kind] or b"\0"
    worker = InThisProcess()
    spec = json.dumps({"batch_size": 4, "epochs": 1, "steps": None, "lr": 0.1}).encode()

    async def test(fleet: FakeFleet) -> None:
        fleet.offer(content, config=changed(), local=spec, population=4, schema="")
        async with client(fleet, tmp_path / "c", worker):
            await fleet.until(lambda: len(fleet.fails) == 1)
        assert fleet.fails[0].code == "exception"
        assert fleet.ledger == {}

    on_loopback(test)
