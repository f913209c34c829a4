"""Commands of operators against a real service with made-up runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedsim.cli.following import FETCHED, follow
from fedsim.cli.operate import run_on_server
from fedsim.cli.settings import Settings
from fedsim.client.operator import Operator
from fedsim.config import load_config
from fedsim.connections import read_connections, write_connection
from fedsim.errors import Interrupted, RunFailed
from fedsim.runs.folder import RunFolder
from fedsim.server.health import DRAINING
from tests.control_server import RUN_ID, Desk, control_desk, record
from tests.unit.cli.invoked import Program


@pytest.fixture
def desk(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    folder = tmp_path_factory.mktemp("coordinator")
    monkeypatch.setenv("FEDSIM_HOME", str(folder / "home"))
    monkeypatch.delenv("FEDSIM_CONNECT", raising=False)
    with control_desk(folder) as made:
        yield made


@pytest.fixture
def home(desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of somebody who is an operator already, under the name lab."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("FEDSIM_HOME", str(folder))
    desk.known("operator").save(folder / "lab.key")
    write_connection(folder, desk.connection(key=folder / "lab.key", name="lab"))
    return folder


@pytest.fixture
def ended(desk: Desk) -> Desk:
    """A coordinator whose run has ended, with all its files."""
    finish(desk)
    return desk


def finish(desk: Desk, state: str = "ok", detail: str = "") -> None:
    """The run goes through its two rounds and ends."""
    made = RunFolder.create(
        desk.runs.path.parent / "made",
        "digits",
        config_text="[run]\nseed = 1\n[output]\nreport = false\n",
        facts={"metrics": ["accuracy", "loss"], "engine": "remote", "run_id": RUN_ID},
        command=["fedsim"],
    )
    for number in range(3):
        made.append_record(record(number))
        desk.runs.tell("round", **record(number))
    (made.path / "checkpoints" / "final.safetensors").write_bytes(b"model")
    best = {"metric": "accuracy", "value": 0.52, "round": 2}
    made.finish({"outcome": state, "rounds": 2, "final": {"accuracy": 0.52}, "best": best, "seconds": 1.0})
    made.path.rename(desk.runs.path) if not any(desk.runs.path.iterdir()) else None
    desk.runs.end(state, detail)


def test_connect_makes_a_key_enrols_it_and_names_the_coordinator(
    fedsim: Program, desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSIM_HOME", str(tmp_path / "home"))
    bundle = desk.bundle(tmp_path / "operator.toml")
    out, _ = fedsim.ended("connect", "lab", "--bundle", str(bundle), "--insecure")
    assert "Next: fedsim watch --connect lab" in out
    lab = read_connections(tmp_path / "home")["lab"]
    assert (lab.address, lab.server_id) == (desk.address, desk.key.public)
    assert lab.key is not None
    assert lab.key.stat().st_mode & 0o077 == 0
    out, _ = fedsim.ended("watch")  # the only one that is known
    assert RUN_ID in out
    # The token is used up; the key that came with it may ask again, another may not.
    fedsim.ended("connect", "lab", "--bundle", str(bundle), "--insecure")
    monkeypatch.setenv("FEDSIM_HOME", str(tmp_path / "other"))
    called = fedsim("connect", "lab", "--bundle", str(bundle), "--insecure", "--format", "json")
    assert called.code == 3
    assert called.document["data"]["code"] == "FS-SRV-023"
    assert "token" not in called.document["data"]["what"]
    assert read_connections(tmp_path / "other") == {}


@pytest.mark.parametrize(
    "text",
    ["", "[", 'server = "x:1"\n', 'server = "nowhere"\nserver_id = "00"\n', "server = 5\n", "\x00"],
)
def test_what_is_no_bundle_is_refused(fedsim: Program, tmp_path: Path, text: str) -> None:
    (tmp_path / "bundle").write_text(text)
    _, err = fedsim.ended("connect", "lab", "--bundle", str(tmp_path / "bundle"), code=2)
    assert "FS-SRV-032" in err


def test_watch_shows_the_rounds_brings_the_results_and_ends_with_the_block(
    fedsim: Program, ended: Desk, home: Path, tmp_path: Path
) -> None:
    out, err = fedsim.ended("watch", "digits", "--connect", "lab")
    lines = out.splitlines()
    assert lines[0].startswith("round 0/2  accuracy 0.5000")
    assert "round 2/2" in lines[2]
    assert any(line.startswith("outcome      ok: finished") for line in lines)
    assert lines[-1].startswith("Next: fedsim show")
    folder = tmp_path / "runs" / ended.runs.path.name
    assert (folder / "checkpoints" / "final.safetensors").read_bytes() == b"model"
    for name in FETCHED:
        there = ended.runs.path / name
        assert (folder / name).exists() == there.exists(), name
    out, _ = fedsim.ended("show", folder.name)
    assert "0.52" in out
    out, _ = fedsim.ended("resume", folder.name)  # only its coordinator could extend it
    assert out.startswith("this run is complete\n")


def test_watch_in_json_is_one_document_and_in_jsonl_one_line_per_round(
    fedsim: Program, ended: Desk, home: Path
) -> None:
    called = fedsim("watch", RUN_ID, "--format", "json")
    assert called.code == 0
    data = called.document["data"]
    assert (data["run_id"], data["state"], data["outcome"], data["rounds"]) == (RUN_ID, "ok", "ok", 2)
    called = fedsim("watch", RUN_ID, "--format", "jsonl")
    lines = [json.loads(line) for line in called.out.splitlines()]
    assert [line.get("event") for line in lines] == ["round", "round", "round", None]
    assert lines[-1]["final"] is True


def test_a_run_that_failed_there_is_exit_1_with_its_reason(fedsim: Program, desk: Desk, home: Path) -> None:
    finish(desk, "failed", "no client answered \x1b[2J")
    called = fedsim("watch", RUN_ID, "--format", "json")
    assert called.code == 1
    data = called.document["data"]
    assert data["code"] == "FS-SRV-026"
    assert "no client answered \\x1b[2J" in data["why"]
    assert "\x1b[2J" not in called.err + called.out


def test_a_run_that_goes_on_after_the_time_is_exit_4(fedsim: Program, desk: Desk, home: Path) -> None:
    _, err = fedsim.ended("watch", RUN_ID, "--timeout", "0.1", code=4)
    assert "FS-SRV-027" in err


def test_stop_says_what_became_of_the_run(fedsim: Program, desk: Desk, home: Path) -> None:
    out, _ = fedsim.ended("stop", "digits", "--connect", "lab")
    assert f"digits ({RUN_ID}): stopping" in out
    called = fedsim("stop", "digits", "--now", "--format", "json")
    assert called.document["data"]["state"] == "stopped"
    _, err = fedsim.ended("stop", "other", code=2)
    assert "NOT_FOUND" in err
    assert "no run is called 'other'" in err


def test_a_run_is_paused_and_continued_and_the_next_command_is_named(
    fedsim: Program, desk: Desk, home: Path
) -> None:
    out, _ = fedsim.ended("pause", "digits", "--connect", "lab")
    assert f"digits ({RUN_ID}): paused" in out
    assert f"Next: fedsim continue {RUN_ID} --connect lab" in out
    assert desk.runs.state == "paused"
    out, _ = fedsim.ended("continue", RUN_ID)
    assert f"digits ({RUN_ID}): running" in out
    assert f"Next: fedsim watch {RUN_ID} --connect lab" in out
    assert desk.runs.state == "running"
    for command, state in (("pause", "paused"), ("continue", "running")):
        assert fedsim(command, "digits", "--format", "json").document["data"]["state"] == state
        assert "NOT_FOUND" in fedsim.ended(command, "other", code=2)[1]


def test_a_run_that_is_over_is_not_said_to_be_paused(
    fedsim: Program, desk: Desk, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.runs.end("ok")
    for name in ("pause", "resume"):
        monkeypatch.setattr(desk.runs, name, desk.runs.get)
    for command in ("pause", "continue"):
        out, _ = fedsim.ended(command, "digits")
        assert out == f"digits ({RUN_ID}): ok, 2 rounds done\n"


@pytest.mark.parametrize("command", ["pause", "continue", "stop"])
def test_a_viewer_changes_no_run(fedsim: Program, desk: Desk, home: Path, command: str) -> None:
    desk.known("viewer").save(home / "viewer.key")
    _, err = fedsim.ended(command, "digits", "--key", str(home / "viewer.key"), code=3)
    assert "FS-SRV-025" in err
    assert desk.runs.state == "running"


def test_the_log_of_a_run_is_printed_line_by_line_without_power_over_the_terminal(
    fedsim: Program, desk: Desk, home: Path
) -> None:
    (desk.runs.path / "log.txt").write_text("round=1 ok\nround=2 \x1b[2J\n", encoding="utf-8")
    out, err = fedsim.ended("logs", "digits", "--connect", "lab")
    assert out.splitlines() == ["round=1 ok", "round=2 \\x1b[2J"]
    assert err == ""
    called = fedsim("logs", RUN_ID, "--format", "json")
    assert called.document["data"] == {"run": RUN_ID, "lines": ["round=1 ok", "round=2 \\x1b[2J"]}
    called = fedsim("logs", RUN_ID, "--format", "jsonl")
    lines = [json.loads(line) for line in called.out.splitlines()]
    assert [line["data"].get("line") for line in lines[:2]] == ["round=1 ok", "round=2 \\x1b[2J"]
    assert lines[2] == {"schema": 1, "status": "ok", "data": {"run": RUN_ID}, "final": True}
    assert "NOT_FOUND" in fedsim.ended("logs", "other", code=2)[1]


def test_a_log_is_followed_until_the_run_is_over(fedsim: Program, desk: Desk, home: Path) -> None:
    log = desk.runs.path / "log.txt"
    log.write_text("first\n")
    asked = desk.runs.get

    def get(run: str) -> Any:
        # The service asks whether the run is over before it reads what is there.
        found = asked(run)
        if desk.runs.state == "running" and "second" not in log.read_text():
            log.write_text("first\nsecond\n")
            desk.runs.end()
        return found

    desk.runs.get = get  # type: ignore[method-assign]
    out, _ = fedsim.ended("logs", "digits", "--follow")
    assert out.splitlines() == ["first", "second"]


def test_ctrl_c_ends_the_reading_of_a_log_and_not_the_run(
    fedsim: Program, desk: Desk, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pressed(self: Operator, run: str, *, follow: bool = False) -> Iterator[str]:
        yield "first"
        raise KeyboardInterrupt

    monkeypatch.setattr(Operator, "logs", pressed)
    out, err = fedsim.ended("logs", "digits", "-f", code=5)
    assert out == "first\n"
    assert "FS-INT-003" in err
    assert desk.runs.state == "running"


def test_an_admin_drains_the_coordinator_and_an_operator_may_not(
    fedsim: Program, desk: Desk, home: Path
) -> None:
    assert "FS-SRV-025" in fedsim.ended("drain", "--connect", "lab", code=3)[1]
    assert desk.drained == []
    desk.known("admin").save(home / "admin.key")
    out, _ = fedsim.ended("drain", "--key", str(home / "admin.key"))
    assert out == f"lab ({desk.address}) drains: transfers end, then the process\n"
    assert desk.drained == [True]
    called = fedsim("drain", "--key", str(home / "admin.key"), "--format", "json")
    assert called.document["data"] == {"connection": "lab", "draining": True}


def test_resuming_the_folder_of_a_coordinators_run_says_how_to_go_on_there(
    fedsim: Program, tmp_path: Path
) -> None:
    facts = {"engine": "remote", "run_id": RUN_ID}
    made = RunFolder.create(tmp_path / "runs", "x", config_text="", facts=facts, command=["fedsim"])
    _, err = fedsim.ended("resume", made.path.name, code=2)
    assert "FS-CFG-134" in err
    assert f"fedsim continue {RUN_ID} --connect NAME" in err


def test_a_coordinator_that_is_not_there_is_exit_3(
    fedsim: Program, desk: Desk, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsim.client.operator.PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr("fedsim.client.operator.connect.__kwdefaults__", {
        **__import__("fedsim.client.operator", fromlist=["connect"]).connect.__kwdefaults__, "patience": 0.2,
    })  # fmt: skip
    called = fedsim(
        "stop",
        "x",
        "--connect",
        "127.0.0.1:1",
        "--insecure",
        "--key",
        str(home / "lab.key"),
        "--format",
        "json",
    )
    assert called.code == 3
    assert called.document["data"]["code"] == "FS-SRV-022"


def test_without_a_key_or_a_coordinator_the_command_line_is_wrong(
    fedsim: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSIM_HOME", str(tmp_path / "home"))
    assert "FS-CFG-129" in fedsim.ended("watch", "--connect", "127.0.0.1:1", code=2)[1]
    assert "FS-CFG-128" in fedsim.ended("watch", code=2)[1]
    assert "FS-CFG-128" in fedsim.ended("watch", "--connect", "lab", code=2)[1]


def test_health_asks_the_coordinator(fedsim: Program, desk: Desk) -> None:
    out, _ = fedsim.ended("health", desk.address, "--insecure")
    assert out == "SERVING\n"
    desk.on_loop(desk.health.unfit(DRAINING, "it drains"))
    called = fedsim("health", desk.address, "--insecure", "--format", "json")
    assert called.code == 3
    assert (called.document["data"]["code"], called.document["status"]) == ("FS-SRV-028", "error")
    _, err = fedsim.ended("health", "127.0.0.1:1", "--insecure", "--timeout", "0.5", code=3)
    assert "FS-SRV-022" in err
    _, err = fedsim.ended("health", "192.0.2.1:1", "--insecure", code=2)
    assert "plain text" in err


def test_names_of_others_have_no_power_over_the_terminal(fedsim: Program, desk: Desk, home: Path) -> None:
    evil = "x\x1b[2J\r\nforged"
    normal = desk.runs.get

    def get(run: str) -> Any:
        found = normal(run)
        found.name, found.detail = evil, evil
        return found

    desk.runs.get = get  # type: ignore[method-assign]
    desk.runs.end("stopped", evil)
    for words in (["watch"], ["stop", "digits"], ["pause", "digits"], ["continue", "digits"]):
        out, err = fedsim.ended(*words)
        assert "\x1b" not in out + err
        assert "\nforged" not in out + err
        assert "\\x1b[2J" in out


def test_run_on_server_submits_the_resolved_configuration(
    desk: Desk, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load_config(sets=["run.rounds=2", "run.name=mine"])
    run_on_server(Settings(runs=tmp_path / "runs"), loaded, connect="lab", detach=True, nodes="site == a")
    ((config, name, run_key, nodes),) = desk.runs.submitted
    assert (name, nodes) == ("mine", "site == a")
    assert run_key
    (tmp_path / "sent.toml").write_text(config)
    assert load_config(tmp_path / "sent.toml").config == loaded.config
    assert f"Next: fedsim watch {RUN_ID} --connect lab" in capsys.readouterr().out
    finish(desk)
    run_on_server(Settings(runs=tmp_path / "runs"), loaded, connect="lab")
    assert "outcome      ok: finished" in capsys.readouterr().out
    with pytest.raises(RunFailed) as caught:
        run_on_server(Settings(runs=tmp_path / "runs"), loaded, connect="lab", require=True)
    assert caught.value.code == "FS-RUN-010"


def test_ctrl_c_ends_the_watching_and_not_the_run(desk: Desk, home: Path) -> None:
    def pressed() -> None:
        raise KeyboardInterrupt

    desk.runs.tell("round", **record(0))
    with Operator(desk.connection(), desk.known("viewer")) as viewer:
        run = viewer.get(RUN_ID)
        with pytest.raises(Interrupted) as caught:
            follow(Settings(verbosity=-1), viewer, run, target="lab", alive=pressed)
    assert caught.value.code == "FS-INT-003"
    assert caught.value.exit_code == 5
    assert f"fedsim stop {RUN_ID}" in str(caught.value.hint)
    assert desk.runs.state == "running"
