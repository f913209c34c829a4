"""Complete small updates per second, and what a coordinator keeps of them: memory, descriptors, database.

``python -m benchmarks.deployment.throughput`` at the root of the repository. Fake clients lease, submit a
10-kB update with new values and wait for the verdict, which means validated and durable; then they lease
again. They run on the same cores as the coordinator. Rounds are synchronous: the rate counts the time in
which the coordinator folds, checkpoints and plans, and everybody waits.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.deployment.coordinator import Coordinator, records, synthetic
from benchmarks.deployment.fleet import FakeFleet, Operator
from benchmarks.deployment.measuring import cpu_seconds, descriptors, keep, machine, memory, table
from fedsim.pb import federation_pb2 as pb

CLASSES = 10
WANTED = 500
WARM_ROUNDS = 5  # after which memory must not grow


@dataclass(eq=False)
class Tally:
    """What the clients saw, and what the coordinator held when each round began.

    Args:
        pid: of the coordinator; database: its file.
    """

    pid: int
    database: Path
    verdicts: Counter[str] = field(default_factory=Counter)
    first: dict[int, float] = field(default_factory=dict)  # round -> first verdict
    last: dict[int, float] = field(default_factory=dict)  # round -> last verdict
    held: list[dict[str, Any]] = field(default_factory=list)

    def done(self, task: pb.Task, reply: pb.SubmitReply) -> None:
        now = time.perf_counter()
        self.verdicts[pb.Verdict.Name(reply.verdict)] += 1
        if task.round_index not in self.first:
            self.first[task.round_index] = now
            self.sample(task.round_index)
        self.last[task.round_index] = now

    def sample(self, round_index: int) -> None:
        now = memory(self.pid)
        size = sum(f.stat().st_size for f in self.database.parent.glob(f"{self.database.name}*"))
        self.held.append({
            "round": round_index, "rss": now.total, "anonymous": now.anonymous,
            "descriptors": descriptors(self.pid), "database": size,
        })  # fmt: skip


async def measure(coordinator: Coordinator, options: argparse.Namespace) -> dict[str, Any]:
    """Let the fleet answer every round of one run."""
    at, pid = coordinator, coordinator.pid
    fleet = FakeFleet(at.address, at.ca, at.tokens)
    operator = Operator(fleet.channel(), "operator", at.operator)
    await operator.enter()
    began = time.perf_counter()
    await fleet.enter()
    entered = time.perf_counter() - began
    features = max(1, options.floats // CLASSES - 1)
    config = synthetic(options.clients, {"name": "logistic"}, options.rounds, features=features)
    tally = Tally(pid, at.state / "fedsim.db")
    working = fleet.serve(tally.done)
    run = await operator.submit(config, "throughput")
    await operator.until(run.run_id, lambda r: r.online == options.clients and not r.detail)
    began, before, own = time.perf_counter(), cpu_seconds(pid), cpu_seconds(os.getpid())
    answered = sum(tally.verdicts.values())
    every = asyncio.ensure_future(
        operator.until(run.run_id, lambda r: r.state == "ok", seconds=options.seconds)
    )
    try:
        while not every.done():
            broken = [t for t in working if t.done()]
            if broken:
                broken[0].result()
            await asyncio.wait([every], timeout=5.0)
            print(f"round {len(tally.first)} of {options.rounds}, {dict(tally.verdicts)}", flush=True)
        every.result()
        spent = max(tally.last.values()) - began
        counted = sum(tally.verdicts.values()) - answered
        taken = cpu_seconds(pid) - before, cpu_seconds(os.getpid()) - own
        tally.sample(options.rounds)
    finally:
        every.cancel()
        for task in working:
            task.cancel()
        await asyncio.gather(*working, return_exceptions=True)
        await fleet.close()
    lines = [r for r in records(at.run_folder().path) if r["round"]]
    return {
        "clients": options.clients,
        "rounds": options.rounds,
        "update_bytes": 4 * CLASSES * (features + 1),
        "entered_seconds": entered,
        "verdicts": dict(tally.verdicts),
        "received": sum(r["received"] for r in lines),
        "seconds": spent,
        "updates_per_second": counted / spent,
        "while_answering_per_second": statistics.median(
            options.clients / (tally.last[i] - tally.first[i]) for i in tally.first
        ),
        "between_rounds_seconds": statistics.median(
            [tally.first[i + 1] - tally.last[i] for i in tally.first if i + 1 in tally.first] or [0.0]
        ),
        "coordinator_cpu_seconds": taken[0],
        "fleet_cpu_seconds": taken[1],
        "held": tally.held,
        **drifts(tally.held),
    }


def drifts(held: list[dict[str, Any]]) -> dict[str, Any]:
    """What grew between the end of warming up and the end, the last sample (after the run) left out."""
    rounds = held[:-1]
    later = [h for h in rounds if h["round"] >= WARM_ROUNDS] or rounds
    third = max(1, len(later) // 3)
    start, end = (statistics.mean(h["rss"] for h in part) for part in (later[:third], later[-third:]))
    return {
        "rss_drift": end / start - 1,
        "descriptors_least": min(h["descriptors"] for h in later),
        "descriptors_most": max(h["descriptors"] for h in later),
        "database_after_warming": later[0]["database"],
        "database_most": max(h["database"] for h in later),
    }


def show(found: dict[str, Any]) -> None:
    enough = "yes" if found["updates_per_second"] >= WANTED else "no"
    spent = found["seconds"]
    print(
        f"\n{found['clients']} clients x {found['rounds']} rounds, updates of {found['update_bytes']} bytes\n"
    )
    print(table(("what", "value"), [
        ("updates per second, over all", f"{found['updates_per_second']:.0f}"),
        (f"at least {WANTED}", enough),
        ("per second while clients answer", f"{found['while_answering_per_second']:.0f}"),
        ("ms from the last verdict to the first of the next round",
         f"{1e3 * found['between_rounds_seconds']:.0f}"),
        ("cores taken by the coordinator", f"{found['coordinator_cpu_seconds'] / spent:.2f}"),
        ("cores taken by the fleet", f"{found['fleet_cpu_seconds'] / spent:.2f}"),
        ("drift of RSS after round 5", f"{found['rss_drift']:+.2%}"),
        ("descriptors, least to most", f"{found['descriptors_least']} to {found['descriptors_most']}"),
        ("MB of database, after round 5 and most",
         f"{found['database_after_warming'] / 1e6:.1f}, {found['database_most'] / 1e6:.1f}"),
    ]))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--floats", type=int, default=2500, help="parameters of the model")
    parser.add_argument("--seconds", type=float, default=1800.0, help="after which the run is given up")
    parser.add_argument("--folder", type=Path, help="where the coordinator's state lies (a new one)")
    parser.add_argument("--json", type=Path, help="result file (beside this module)")
    options = parser.parse_args()
    facts = machine()
    with tempfile.TemporaryDirectory(prefix="fedsim-bench-", dir=options.folder) as folder:
        names = [f"client-{number:04d}" for number in range(options.clients)]
        with Coordinator(Path(folder), names) as coordinator:
            found = asyncio.run(measure(coordinator, options))
    show(found)
    keep(options.json, __file__, {"machine": facts, **found})


if __name__ == "__main__":
    main()
