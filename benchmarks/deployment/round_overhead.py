"""What a round costs beside training: a tiny model and five real client processes on loopback, with TLS.

``python -m benchmarks.deployment.round_overhead`` at the root of the repository. ``fedsim up`` starts the
coordinator and the clients, each a process with a warm worker. The overhead of a round is its whole period,
from one commit in the ledger to the next, minus the training of the slowest client by the client's own
clock. What clients say of their training is in their signed answers, which the ledger keeps for two
rounds: it is read now and then while the run goes on, so that not every round is looked at.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks.deployment.coordinator import records, synthetic
from benchmarks.deployment.measuring import keep, machine, table
from fedsim.pb import federation_pb2 as pb

WANTED_MS = 50.0
WARM_ROUNDS = 10  # first ones: workers start, data is built
LOOK_SECONDS = 0.25


def follow(command: list[str], ledger: Path, seconds: float) -> dict[int, list[float]]:
    """Let the federation run; window -> training seconds of its clients, for the windows that were seen."""
    said: dict[int, dict[bytes, float]] = {}
    end = time.monotonic() + seconds
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(command, env=environ)
    try:
        while child.poll() is None:
            if time.monotonic() > end:
                raise RuntimeError(f"the run did not end in {seconds:g} s")
            time.sleep(LOOK_SECONDS)
            if ledger.exists():
                look(ledger, said)
    finally:
        if child.poll() is None:
            child.terminate()
            child.wait(30)
    if child.returncode:
        raise RuntimeError(f"fedsim up ended with exit code {child.returncode}")
    return {window: list(tasks.values()) for window, tasks in said.items()}


def look(ledger: Path, said: dict[int, dict[bytes, float]]) -> None:
    """Add what the answers of the last rounds say."""
    query = "select t.window, s.task_id, s.body from submissions s join tasks t on t.task_id = s.task_id"
    with closing(sqlite3.connect(f"file:{ledger}?mode=ro", uri=True, timeout=5.0)) as connection:
        try:
            rows = connection.execute(query).fetchall()
        except sqlite3.OperationalError:
            return  # it has no tables yet
    for window, task_id, body in rows:
        said.setdefault(window, {})[task_id] = pb.SubmitBody.FromString(body).train_seconds


def commits(ledger: Path) -> dict[int, float]:
    """Window -> when it was committed, seconds since 1970; -1 is the evaluation before training."""
    with closing(sqlite3.connect(f"file:{ledger}?mode=ro", uri=True)) as connection:
        return dict(connection.execute("select window, committed_at from windows"))


def arrivals(folder: Path) -> dict[int, float]:
    """Round -> seconds from dispatch to the last answer, on the run's clock."""
    last: dict[int, float] = {}
    for line in (folder / "clients.jsonl").read_text().splitlines():
        row = json.loads(line)
        last[row["round"]] = max(last.get(row["round"], 0.0), row["seconds"])
    return last


def evaluated(state: Path, train: dict[int, list[float]], clients: int) -> dict[str, Any]:
    """Milliseconds of every round that was seen whole."""
    committed = commits(state / "fedsim.db")
    (folder,) = (state / "runs").iterdir()
    waited = arrivals(folder)
    rows = []
    for record in records(folder):
        window, number = record["round"] - 1, record["round"]
        known = train.get(window, [])
        if window < WARM_ROUNDS or len(known) < clients or window - 1 not in committed:
            continue
        period = committed[window] - committed[window - 1]
        inside = record["time"]["seconds"]
        rows.append({
            "round": number,
            "period": 1e3 * period,
            "train": 1e3 * max(known),
            "overhead": 1e3 * (period - max(known)),
            "to_clients_and_back": 1e3 * (waited[number] - max(known)),
            "plan_and_fold": 1e3 * (inside - waited[number]),
            "checkpoint": 1e3 * (period - inside),
        })  # fmt: skip
    if not rows:
        raise RuntimeError("no round was seen whole: let it do more rounds")
    parts = ("period", "train", "overhead", "to_clients_and_back", "plan_and_fold", "checkpoint")
    return {
        "clients": clients,
        "rounds": len(committed) - 1,
        "rounds_seen": len(rows),
        "median_ms": {part: statistics.median(row[part] for row in rows) for part in parts},
        "p90_ms": {part: statistics.quantiles((row[part] for row in rows), n=10)[-1] for part in parts}
        if len(rows) > 1 else {},
        "rows": rows,
    }  # fmt: skip


WORDS = {
    "period": "whole round, commit to commit",
    "train": "training of the slowest client",
    "overhead": "overhead",
    "to_clients_and_back": "of it: dispatch to the last verdict, without training",
    "plan_and_fold": "of it: plan, fold and close",
    "checkpoint": "of it: checkpoint and commit",
}


def show(found: dict[str, Any]) -> None:
    median, high = found["median_ms"], found["p90_ms"]
    print(f"\n{found['clients']} client processes, {found['rounds_seen']} of {found['rounds']} rounds seen\n")
    rows = [(words, f"{median[n]:.1f}", f"{high.get(n, 0):.1f}") for n, words in WORDS.items()]
    print(table(("milliseconds", "median", "90 %"), rows))
    print(f"\nbelow {WANTED_MS:g} ms: {'yes' if median['overhead'] < WANTED_MS else 'no'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=600.0, help="after which it is given up")
    parser.add_argument("--json", type=Path, help="result file (beside this module)")
    options = parser.parse_args()
    facts = machine()
    folder = Path(tempfile.mkdtemp(prefix="fedsim-bench-"))
    try:
        config = folder / "run.toml"
        config.write_text(synthetic(options.clients, {"name": "logistic"}, options.rounds))
        state = folder / "up"
        command = [sys.executable, "-m", "fedsim", "up", str(config), "--clients", str(options.clients),
                   "--state", str(state), "--keep", "--quiet"]  # fmt: skip
        train = follow(command, state / "coordinator" / "fedsim.db", options.seconds)
        found = evaluated(state / "coordinator", train, options.clients)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    show(found)
    keep(options.json, __file__, {"machine": facts, **found})


if __name__ == "__main__":
    main()
