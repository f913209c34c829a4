"""The block that ends every run, always the same, and the data of a run for programs."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsim.cli.output import pairs
from fedsim.printable import printable
from fedsim.runs import measures
from fedsim.runs.folder import REPORT, RunFolder
from fedsim.runs.numbers import in_bytes, in_time, short, some
from fedsim.runs.troubles import counts, troubles

Data = dict[str, Any]  # Any: JSON

MOST_TROUBLES = 5
OUTCOMES = {
    "ok": "finished",
    "target": "reached its target",
    "early_stop": "stopped early, no longer improving",
    "interrupted": "interrupted, can be resumed",
    "running": "running",
    "stopped": "stopped without an end, can be resumed",
}


def run_data(folder: RunFolder) -> Data:
    """``data`` of a run: path, outcome, rounds, final, best, seconds, cost, answers not counted."""
    manifest, records = folder.manifest, folder.records()
    ended = manifest.get("result") or {}
    cost = measures.cost(records)
    metric = measures.main_metric(manifest["facts"], records)
    names = manifest["facts"].get("metrics") or [metric]
    top = measures.best(records, metric)
    final = {n: s.values[-1].item() for n in names if (s := measures.series(records, n))}
    found = {"metric": metric, "value": top[1], "round": top[0]} if top else {}
    return {
        "path": str(folder.path),
        "name": folder.name,
        "outcome": folder.status(),
        "rounds": ended.get("rounds", cost.rounds),
        "final": ended.get("final") or final,
        "best": ended.get("best") or found,
        "seconds": ended.get("seconds", cost.seconds),
        "over_clients": _over_clients(records),
        "failed_rounds": cost.failed,
        "bytes_down": cost.bytes_down,
        "bytes_up": cost.bytes_up,
        "not_counted": counts(troubles(folder.path)),
        "report": str(folder.path / REPORT) if (folder.path / REPORT).exists() else None,
        "error": ended.get("error"),
    }


def end_block(
    folder: RunFolder, data: Data, *, rounds: int, expected: Mapping[str, Any] | None = None
) -> list[str]:
    """The lines that end a run.

    Args:
        data: from `run_data`.
        rounds: that were asked for.
        expected: of the preset: metric, value, tolerance, round.
    """
    records = folder.records()
    outcome = str(data["outcome"])
    words = (data["error"] or {}).get("what") if outcome == "failed" else OUTCOMES.get(outcome)
    shown: dict[str, object] = {"outcome": f"{outcome}: {words}" if words else outcome}
    failed = data["failed_rounds"]
    shown["rounds"] = f"{data['rounds']} of {rounds}, {failed} failed"
    best = data["best"]
    for name, value in data["final"].items():
        found = measures.series(records, name)
        at = f" (round {found.rounds[-1]:.0f})" if found else ""
        top = ""
        if best.get("metric") == name:
            top = f", best {short(best['value'])} (round {best['round']})"
        shown[name] = f"{short(value)}{at}{top}"
    spread = data["over_clients"]
    if spread:
        shown["over clients"] = (
            f"accuracy mean {short(spread['mean'])}, worst tenth {short(spread['worst10'])}, "
            f"deviation {short(spread['std'])}"
        )
    if expected:
        shown["expected"] = _expected(expected, data["final"])
    shown["not counted"] = _not_counted(folder)
    shown["time"] = in_time(data["seconds"])
    shown["bytes"] = f"{in_bytes(data['bytes_down'])} down, {in_bytes(data['bytes_up'])} up"
    shown["folder"] = data["path"]
    if data["report"] is not None:
        shown["report"] = data["report"]
    return [*pairs(shown), f"Next: {next_command(folder, outcome)}"]


def next_command(folder: RunFolder, outcome: str) -> str:
    """One sensible continuation, as it can be typed here."""
    usual = Path(os.environ.get("FEDSIM_RUNS", "runs")).resolve()
    name = folder.path.name
    if folder.path.parent.resolve() != usual:
        name = shlex.quote(str(folder.path))
    facts = folder.manifest["facts"]
    # Of a coordinator's run the state is there, not in the folder.
    again = f"fedsim continue {facts['run_id']}" if "run_id" in facts else f"fedsim resume {name}"
    if outcome in ("interrupted", "stopped"):
        return again
    if outcome == "failed":
        return f"fedsim show {name}, then {again} to try again"
    return f"fedsim show {name}, or open its report in a browser"


def _over_clients(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The last evaluation of the clients: mean, worst tenth and deviation of accuracy; {} before any."""
    found = {name: measures.series(records, f"client_accuracy_{name}") for name in ("mean", "worst10", "std")}
    return {name: series.values[-1].item() for name, series in found.items() if series}


def _expected(expected: Mapping[str, Any], final: Mapping[str, Any]) -> str:
    metric, value = expected["metric"], expected["value"]
    tolerance = expected.get("tolerance", 0.0)
    text = f"{metric} {short(value)} ± {short(tolerance)} after {expected['round']} rounds"
    got = final.get(metric)
    if got is None:
        return text
    difference = abs(got - value)
    return f"{text}: {'as expected' if difference <= tolerance else f'off by {short(difference)}'}"


def _not_counted(folder: RunFolder) -> str:
    """Refused, late and lost answers with reasons, the most frequent first."""
    found = troubles(folder.path)
    if not found:
        return "none: every answer of every client counted"
    told = ", ".join(f"{count:,} {verdict}" for verdict, count in counts(found).items())
    rows = [
        f"  client {t.client}: {t.verdict}"
        + (f", {printable(t.reason)}" if t.reason else "")
        + f", rounds {some(sorted(set(t.rounds)))}"
        for t in found[:MOST_TROUBLES]
    ]
    rest = len(found) - len(rows)
    if rest > 0:
        rows.append(f"  and {rest:,} more in clients.jsonl")
    return "\n".join([told, *rows])
