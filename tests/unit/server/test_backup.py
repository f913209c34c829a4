"""A state folder saved, restored as an older self, and shown without its secrets."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import torch

from fedsim import Simulation
from fedsim.errors import ConfigError, EnvironmentProblem
from fedsim.identity import Key
from fedsim.server.backup import back_up, restore, support_bundle
from fedsim.server.database import open_database
from tests.fleet import Coordinator, make_nodes, toml_of
from tests.wired import config


def settings() -> dict[str, object]:
    values = config("scaffold")
    values["output"] = {"report": False, "plots": False}
    values["deployment"] = {"min_clients": 4}
    return values


@pytest.fixture
def stopped(tmp_path: Path) -> Coordinator:
    """A coordinator that was stopped in the middle of a run."""
    made = Coordinator(tmp_path / "state", Key.new(), make_nodes(tmp_path, 4)).start()
    made.key.save(made.state / "identity.key")
    run = made.runs.submit(toml_of(settings()), "run", "", "")
    made.serve(run.run_id, until=lambda: made.runs.get(run.run_id).rounds_done >= 2)
    made.stop()
    return made


def test_a_restored_state_goes_on_to_the_same_model_under_the_next_incarnation(
    stopped: Coordinator, tmp_path: Path
) -> None:
    assert back_up(stopped.state, tmp_path / "backup.tar") > 5
    assert (tmp_path / "backup.tar").stat().st_mode & 0o077 == 0
    again = tmp_path / "again"
    before = open_database("sqlite", stopped.state)
    incarnation = before.incarnation
    before.close()
    assert restore(tmp_path / "backup.tar", again) == incarnation + 1
    found = Coordinator(again, stopped.key, stopped.nodes).start()
    assert found.database.incarnation == incarnation + 1
    (run,) = found.runs.list()
    assert found.serve(run.run_id) == "ok"
    simulated = Simulation(settings())
    list(simulated)
    from safetensors.torch import load_file

    got = load_file(found.runs.folder(run.run_id) / "checkpoints" / "final.safetensors")
    want = simulated.model_tensors()
    assert all(torch.equal(want[name], got[name]) for name in want)
    found.stop()


def test_a_running_coordinator_is_not_copied_halfway(stopped: Coordinator, tmp_path: Path) -> None:
    database = open_database("sqlite", stopped.state)
    with pytest.raises(EnvironmentProblem) as caught:
        back_up(stopped.state, tmp_path / "backup.tar")
    assert caught.value.code == "FS-LED-007"
    assert not (tmp_path / "backup.tar").exists()
    database.close()


def test_nothing_is_restored_over_a_state_nor_from_something_else(
    stopped: Coordinator, tmp_path: Path
) -> None:
    back_up(stopped.state, tmp_path / "backup.tar")
    with pytest.raises(ConfigError) as caught:
        restore(tmp_path / "backup.tar", stopped.state)
    assert caught.value.code == "FS-SRV-061"
    (tmp_path / "text.tar").write_text("no tar")
    with pytest.raises(ConfigError) as caught:
        restore(tmp_path / "text.tar", tmp_path / "new")
    assert caught.value.code == "FS-SRV-062"
    with pytest.raises(ConfigError) as caught:
        back_up(tmp_path / "nothing", tmp_path / "x.tar")
    assert caught.value.code == "FS-SRV-060"


def test_a_support_bundle_holds_texts_and_no_secret(stopped: Coordinator, tmp_path: Path) -> None:
    names = support_bundle(stopped.state, tmp_path / "support.tar.gz")
    assert {"versions.json", "nodes.jsonl", "runs.jsonl", "windows.jsonl", "events.jsonl"} < set(names)
    with tarfile.open(tmp_path / "support.tar.gz") as tar:
        assert sorted(tar.getnames()) == sorted(names)
        content = b"".join(tar.extractfile(name).read() for name in names)  # type: ignore[union-attr]
    secret = (stopped.state / "identity.key").read_text().splitlines()[1]
    assert secret.encode() not in content
    assert not any(name.endswith((".key", ".safetensors", ".db")) for name in names)
