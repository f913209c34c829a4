"""What is seen while a run goes on, and at its end."""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from fedsim.cli.ending import end_block, run_data
from fedsim.cli.interrupt import stop_on_signal
from fedsim.cli.settings import Settings
from fedsim.cli.view import LiveView, PlainView, answers, change
from fedsim.runs.folder import RunFolder


def record(number: int, **more: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "round": number, "outcome": "ok", "cohort": 10, "received": 9, "refused": 1, "late": 0, "lost": 0,
        "accuracy": 0.5 + number / 100, "loss": 1.0, "train_loss": 0.5, "bytes_down": 1000, "bytes_up": 500,
        "time": {"seconds": 1.5, "rss_mb": 300},
    }  # fmt: skip
    return base | more


def test_a_plain_view_writes_one_line_per_round() -> None:
    stream = io.StringIO()
    with PlainView(stream, rounds=12, metric="accuracy") as view:
        view.record(record(0, outcome="start"))
        view.record(record(1))
        view.record(record(2, outcome="failed", accuracy=None))
    first, second, third = stream.getvalue().splitlines()
    assert first == "round 0/12  accuracy 0.5000  loss 1  train loss 0.5"
    assert "accuracy 0.5100 (+0.0100)" in second
    assert "clients 9/10, 1 refused, 0 late, 0 lost" in second
    assert third.endswith("FAILED")


def test_a_plain_view_gives_a_sign_of_life_in_a_long_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsim.cli.view.SILENCE_SECONDS", 0.0)
    stream = io.StringIO()
    view = PlainView(stream, rounds=5, metric="accuracy")
    waits = iter([False, True])
    monkeypatch.setattr(view._ended, "wait", lambda seconds: next(waits))
    view._beat()
    assert stream.getvalue().startswith("round 1/5  working")


def test_a_reader_that_went_away_does_not_end_the_run() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as stream:
        view = PlainView(stream, rounds=5, metric="accuracy")
        view.record(record(1))
        view.record(record(2))


def test_the_live_view_shows_round_metric_cost_and_failures() -> None:
    from rich.console import Console

    stream = io.StringIO()
    view = LiveView(Settings(), stream, "digits-run", rounds=10, metric="accuracy")
    view.record(record(1))
    view.record(record(2, outcome="failed", accuracy=None))
    view.stopping()
    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    console.print(view._render())
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for piece in ("digits-run", "round 2/10", "1 failed rounds, 2 refused answers", "down 2 kB", "stopping"):
        assert piece in shown, piece


def test_changes_and_answers_are_written_with_their_signs_and_zeros() -> None:
    assert change(0.5, None) == ""
    assert change(0.5, 0.6) == " (-0.1000)"
    assert answers({"received": 3, "cohort": 4}) == "clients 3/4, 0 refused, 0 late, 0 lost"


def test_the_first_signal_asks_and_the_second_stops() -> None:
    told: list[bool] = []
    before = signal.getsignal(signal.SIGINT)
    with stop_on_signal(lambda: told.append(True)) as stop:
        assert not stop()
        signal.raise_signal(signal.SIGINT)
        assert stop()
        assert told == [True]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    run = RunFolder.create(
        tmp_path,
        "a run",
        config_text="[run]\nseed = 1\n",
        facts={"metrics": ["accuracy", "loss"]},
        command=["fedsim"],
    )
    for number in range(4):
        run.append_record(
            record(number, client_accuracy_worst10=0.2, client_accuracy_mean=0.5, client_accuracy_std=0.1)
        )
    run.append_clients(
        {"round": [1, 2], "client": [7, 7], "verdict": ["refused"] * 2, "reason": ["not finite"] * 2}
    )
    return run


def test_the_end_block_tells_outcome_metrics_refusals_cost_and_what_next(folder: RunFolder) -> None:
    best = {"metric": "accuracy", "value": 0.53, "round": 3}
    folder.finish(
        {"outcome": "ok", "rounds": 3, "final": {"accuracy": 0.53, "loss": 1.0}, "best": best, "seconds": 4.5}
    )
    data = run_data(folder)
    expected = {"metric": "accuracy", "value": 0.6, "tolerance": 0.02, "round": 3}
    text = "\n".join(end_block(folder, data, rounds=3, expected=expected))
    for piece in (
        "ok: finished", "3 of 3, 0 failed", "0.53 (round 3), best 0.53 (round 3)", "worst tenth 0.2",
        "off by 0.07", "2 refused", "client 7: refused, not finite, rounds 1, 2", "4.5 s",
        "4 kB down, 2 kB up", str(folder.path), "Next: fedsim show",
    ):  # fmt: skip
        assert piece in text, piece
    assert (data["outcome"], data["rounds"], data["seconds"]) == ("ok", 3, 4.5)
    assert data["not_counted"] == {"refused": 2}


def test_a_run_that_died_is_shown_from_its_lines_and_can_be_resumed(folder: RunFolder) -> None:
    data = run_data(folder)
    assert (data["outcome"], data["rounds"]) == ("stopped", 3)
    assert data["final"] == {"accuracy": 0.53, "loss": 1.0}
    assert data["best"] == {"metric": "accuracy", "value": 0.53, "round": 3}
    assert end_block(folder, data, rounds=9)[-1] == f"Next: fedsim resume {folder.path}"


def test_a_failed_run_says_why(folder: RunFolder) -> None:
    error = {"code": "FS-RUN-003", "what": "all answers were refused", "why": None}
    folder.finish({"outcome": "failed", "rounds": 0, "final": {}, "best": {}, "seconds": 1.0, "error": error})
    assert end_block(folder, run_data(folder), rounds=3)[0].endswith("failed: all answers were refused")
