"""What is seen while a run goes on: a live view on a terminal, one plain line per round elsewhere."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from fedsim.cli.output import colours, event, people, write
from fedsim.cli.settings import Settings
from fedsim.runs.numbers import in_bytes, in_time, short

if TYPE_CHECKING:
    from rich.console import RenderableType

Record = Mapping[str, Any]  # Any: a line of metrics.jsonl

SILENCE_SECONDS = 30.0
STOPPING = "stopping after this round; Ctrl-C again stops at once"


class View(Protocol):
    """A context in which a run is shown."""

    def __enter__(self) -> View: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def record(self, record: Record) -> None:
        """A round is on disk."""
        ...

    def stopping(self) -> None:
        """The run was asked to stop; called from a signal handler, so it must not print by itself."""
        ...


def view_for(settings: Settings, label: str, *, rounds: int, metric: str) -> View:
    """The view that fits the output.

    Args:
        label: of the run; metric: that it is about.
        rounds: after which the run is complete.
    """
    if settings.format == "jsonl":
        return EventView()
    if settings.quiet:
        return SilentView()
    stream = people(settings)
    if stream.isatty() and settings.progress and os.environ.get("TERM") != "dumb":
        return LiveView(settings, stream, label, rounds=rounds, metric=metric)
    return PlainView(stream, rounds=rounds, metric=metric)


class SilentView:
    """Nothing at all."""

    def __enter__(self) -> SilentView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def record(self, record: Record) -> None:
        return None

    def stopping(self) -> None:
        os.write(sys.stderr.fileno(), f"{STOPPING}\n".encode())


class EventView(SilentView):
    """One JSON object per round on stdout."""

    def record(self, record: Record) -> None:
        event("round", record)


class PlainView:
    """One line per round, and a sign of life where a round takes longer than half a minute."""

    def __init__(self, stream: TextIO, *, rounds: int, metric: str) -> None:
        self._stream = stream
        self._rounds, self._metric = rounds, metric
        self._last: float | None = None
        self._done = 0
        self._ended = threading.Event()
        self._heartbeat = threading.Thread(target=self._beat, daemon=True)
        self._spoke = time.monotonic()

    def __enter__(self) -> PlainView:
        self._heartbeat.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._heartbeat.join()

    def record(self, record: Record) -> None:
        self._done = int(record["round"])
        parts = [f"round {self._done}/{self._rounds}"]
        value = record.get(self._metric)
        if isinstance(value, (int, float)):
            parts.append(f"{self._metric} {value:.4f}{change(value, self._last)}")
            self._last = float(value)
        for name in ("loss", "train_loss"):
            if name in record and name != self._metric:
                parts.append(f"{name.replace('_', ' ')} {short(record[name])}")
        if record["outcome"] != "start":
            parts.append(answers(record))
            parts.append(in_time(record["time"]["seconds"]))
        if record["outcome"] == "failed":
            parts.append("FAILED")
        self._say("  ".join(parts))

    def stopping(self) -> None:
        os.write(sys.stderr.fileno(), f"{STOPPING}\n".encode())

    def _say(self, line: str) -> None:
        self._spoke = time.monotonic()
        write(self._stream, line)

    def _beat(self) -> None:
        began = self._spoke
        while not self._ended.wait(1.0):
            if time.monotonic() - self._spoke >= SILENCE_SECONDS:
                self._say(
                    f"round {self._done + 1}/{self._rounds}  working, {in_time(time.monotonic() - began)}"
                )


class LiveView:
    """Three lines that are redrawn about five times a second; the screen is restored at the end."""

    def __init__(self, settings: Settings, stream: TextIO, label: str, *, rounds: int, metric: str) -> None:
        from rich.console import Console
        from rich.live import Live

        console = Console(file=stream, no_color=not colours(settings, stream), highlight=False)
        self._label, self._rounds, self._metric = label, rounds, metric
        self._began = time.monotonic()
        self._record: Record | None = None
        self._first = 0
        self._change = ""
        self._last: float | None = None
        self._bytes = {"bytes_up": 0, "bytes_down": 0}
        self._failed = self._refused = 0
        self._stopping = False
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=5, transient=True)

    def __enter__(self) -> LiveView:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def record(self, record: Record) -> None:
        if self._record is None:
            self._first, self._began = int(record["round"]), time.monotonic()
        value = record.get(self._metric)
        if isinstance(value, (int, float)):
            self._change, self._last = change(value, self._last), float(value)
        for name in self._bytes:
            self._bytes[name] += record.get(name) or 0
        self._failed += record["outcome"] == "failed"
        self._refused += record.get("refused") or 0
        self._record = record

    def stopping(self) -> None:
        self._stopping = True

    def _render(self) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        record = self._record
        done = int(record["round"]) if record else 0
        elapsed = time.monotonic() - self._began
        lines = Table.grid(padding=(0, 3, 0, 0))
        head = Table.grid(padding=(0, 3, 0, 0))
        each = elapsed / (done - self._first) if done > self._first else None
        pace = "" if each is None else f"{each:.2g} s/round   left {in_time(each * (self._rounds - done))}"
        bar = ProgressBar(total=max(1, self._rounds), completed=done, width=18)
        head.add_row(Text(self._label, style="bold"), f"round {done}/{self._rounds}", bar, pace)
        lines.add_row(head)
        if record is not None:
            told = [answers(record)] if record["outcome"] != "start" else ["before training"]
            if self._last is not None:
                told.append(f"{self._metric} {self._last:.4f}{self._change}")
            if self._metric != "loss" and record.get("loss") is not None:
                told.append(f"loss {short(record['loss'])}")
            lines.add_row(Text("   ".join(told)))
            cost = [
                f"memory {in_bytes(record['time']['rss_mb'] * 2**20)}",
                f"up {in_bytes(self._bytes['bytes_up'])}",
                f"down {in_bytes(self._bytes['bytes_down'])}",
                f"so far {self._failed} failed rounds, {self._refused} refused answers",
            ]
            lines.add_row(Text("   ".join(cost), style="dim"))
        if self._stopping:
            lines.add_row(Text(STOPPING, style="yellow"))
        return lines


def change(value: float, before: float | None) -> str:
    """`` (+0.004)`` against the evaluation before."""
    return "" if before is None else f" ({value - before:+.4f})"


def answers(record: Record) -> str:
    """``clients 10/10, 0 refused, 0 late, 0 lost``; a zero is said too, so that its absence is no doubt."""
    counts = ", ".join(f"{record.get(name) or 0} {name}" for name in ("refused", "late", "lost"))
    return f"clients {record.get('received') or 0}/{record.get('cohort') or 0}, {counts}"
