"""The form of every command: help, formats, errors, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
import typer

from fedsim.cli import make_app
from fedsim.cli.output import columns, plain
from fedsim.errors import EnvironmentProblem
from tests.unit.cli.invoked import Program

FIELDS = {"code", "what", "where", "why", "hint", "exit_code"}


def commands() -> list[tuple[str, ...]]:
    """Every command as the words that call it."""
    root = typer.main.get_command(make_app())
    assert isinstance(root, click.Group)
    found: list[tuple[str, ...]] = []
    for name, command in root.commands.items():
        if isinstance(command, click.Group):
            found += [(name, inner) for inner in command.commands]
        else:
            found.append((name,))
    return found


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_has_help_with_the_common_options(fedsim: Program, words: tuple[str, ...]) -> None:
    code, out, err = fedsim(*words, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"Usage: fedsim {' '.join(words)}")
    for option in ("--format", "--quiet", "--runs", "--no-color", "--no-progress", "--traceback"):
        assert option in out
    assert "\\[" not in out
    assert max(len(line) for line in out.splitlines()) <= 80


def test_positional_arguments_are_explained(fedsim: Program) -> None:
    _, out, _ = fedsim("node", "approve", "--help")
    assert "Name or identifier." in out


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_wrong_usage_of_every_command_is_one_error_with_a_code_and_a_hint(
    fedsim: Program, words: tuple[str, ...]
) -> None:
    called = fedsim(*words, "--no-such-option", "--format", "json")
    assert called.code == 2
    document = called.document
    assert (document["schema"], document["status"]) == (1, "error")
    assert set(document["data"]) == FIELDS
    assert document["data"]["code"] == "FS-CFG-020"
    assert "--help" in document["data"]["hint"]
    assert "FS-CFG-020" in called.err
    assert "Traceback" not in called.err


@pytest.mark.parametrize(
    "words",
    [
        ("ls",), ("plugins",), ("plugins", "show", "fedavg"), ("data", "ls"), ("data", "show"),
        ("config", "show"), ("config", "validate"), ("config", "schema"), ("config", "presets"),
        ("config", "explain", "client"), ("explain",), ("explain", "FS-CFG-004"), ("run", "--dry-run"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_json_is_one_document_and_text_is_none(fedsim: Program, words: tuple[str, ...]) -> None:
    called = fedsim(*words, "--format", "json")
    assert called.code == 0, called.err
    assert called.document["schema"] == 1
    assert called.document["status"] == "ok"
    assert called.document["data"]
    last = json.loads(fedsim(*words, "--format", "jsonl").out.splitlines()[-1])
    assert last["final"] is True
    text = fedsim(*words)
    assert text.code == 0
    with pytest.raises(json.JSONDecodeError):
        # The schema is JSON in either form; as text it stands alone.
        json.loads(text.out) if words != ("config", "schema") else json.loads("schema:")


def test_common_options_are_taken_before_and_after_the_command(fedsim: Program) -> None:
    before = fedsim("--format", "json", "--runs", "here", "ls")
    after = fedsim("ls", "--format", "json", "--runs", "here")
    assert before.document == after.document
    assert before.document["data"]["folder"] == "here"


def test_the_variable_names_the_folder_of_the_runs(fedsim: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSIM_RUNS", "elsewhere")
    assert fedsim("ls", "--format", "json").document["data"]["folder"] == "elsewhere"
    assert fedsim("ls", "--format", "json", "--runs", "x").document["data"]["folder"] == "x"


def test_the_error_has_its_form_and_names_its_page(fedsim: Program) -> None:
    called = fedsim("run", "--set", "data.partition.alhpa=1")
    assert called.code == 2
    assert called.out == ""
    lines = called.err.splitlines()
    assert lines[0] == "error[FS-CFG-004]: unknown key `alhpa` in [data.partition], did you mean `alpha`?"
    assert lines[1].startswith("  --> --set data.partition.alhpa=1: [data.partition]")
    assert lines[-2] == "  help: write `alpha`"
    assert lines[-1] == "  more: fedsim explain FS-CFG-004"


def test_an_error_shows_where_it_arose_when_asked(fedsim: Program) -> None:
    assert "Traceback" not in fedsim("run", "--set", "run.rounds=x").err
    assert "Traceback" in fedsim("run", "--set", "run.rounds=x", "--traceback").err


def test_a_bug_ends_with_70_and_names_a_file_with_the_traceback(
    fedsim: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object, **more: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("fedsim.runs.find.list_runs", broken)
    called = fedsim("ls", "--format", "json")
    assert called.code == 70
    assert called.document["data"]["code"] == "FS-BUG-001"
    assert called.document["data"]["exit_code"] == 70
    log = Path(called.document["data"]["where"])
    assert "RuntimeError: a bug" in log.read_text()
    assert "Traceback" not in called.err
    log.unlink()


@pytest.mark.parametrize(
    ("error", "code", "exit_code"),
    [
        (MemoryError("no"), "FS-ENV-003", 6),
        (OSError(28, "No space left on device", "/disk/file"), "FS-ENV-004", 6),
        (EnvironmentProblem("x", code="FS-ENV-020"), "FS-ENV-020", 6),
        (KeyboardInterrupt(), "FS-INT-002", 130),
        (OSError(5, "Input/output error"), "FS-BUG-001", 70),
    ],
)
def test_each_kind_of_error_has_its_exit_code(
    fedsim: Program,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: str,
    exit_code: int,
) -> None:
    def broken(*arguments: object, **more: object) -> None:
        raise error

    monkeypatch.setattr("fedsim.runs.find.list_runs", broken)
    called = fedsim("ls", "--format", "json")
    assert called.code == exit_code
    assert called.document["data"]["code"] == code
    if code == "FS-BUG-001":
        Path(called.document["data"]["where"]).unlink()


def test_without_a_command_the_help_is_shown(fedsim: Program) -> None:
    code, out, _ = fedsim()
    assert code == 0
    assert "Commands:" in out


def test_the_version_is_that_of_the_package(fedsim: Program) -> None:
    from fedsim import __version__

    assert fedsim("--version").out == f"fedsim {__version__}\n"


def test_a_table_is_never_cut() -> None:
    lines = columns(["name", "n"], [["x" * 200, 1], ["y", 22]], right=(1,))
    assert lines[2] == f"{'x' * 200}   1"
    assert lines[3].endswith(" 22")


def test_what_json_cannot_hold_becomes_null_or_text() -> None:
    import numpy as np

    found = plain({"a": float("nan"), "b": Path("x/y"), "c": (np.float64(1.5), np.int64(2)), "d": {3, 1}})
    assert found == {"a": None, "b": "x/y", "c": [1.5, 2], "d": [1, 3]}
