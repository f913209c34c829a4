"""A large model to and from two clients, against what gRPC can do at best on the same machine.

``python -m benchmarks.deployment.transfer`` at the root of the repository. Every round is measured beside a
bare stream (`bare_stream`) of the same size, chunk size, number of connections and TLS, so that a busy
machine slows both. The model is fetched twice: by clients that check nothing, as the load generator shares
the cores with the coordinator and a real client does not, and by clients that check every CRC and the
digest. An upload is over when the coordinator has hashed it and has it on its disk. The coordinator's
memory is sampled in every phase, from the moment the run is loaded and waits for its clients; over all phases
the kernel itself keeps the peak of its resident memory, mapped files and all.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.deployment.bare_stream import BareStream
from benchmarks.deployment.coordinator import Coordinator, synthetic
from benchmarks.deployment.fleet import FakeFleet, FakeNode, Operator
from benchmarks.deployment.measuring import (
    Memory,
    Watch,
    cpu_seconds,
    disk_bytes_per_second,
    forget_peak,
    keep,
    machine,
    memory,
    peak,
    table,
)
from fedsim.pb import federation_pb2 as pb

FEATURES, CLASSES = 60, 10
RATE_WANTED, MEMORY_WANTED = 0.6, 1.5
PHASES = ("plan", "down", "down_checked", "up", "submit", "aggregate", "finish")
TRANSFER = ("down", "down_checked", "up")
BARE = ("bare_down", "bare_up", "bare_kept")
RATED = (*TRANSFER, *BARE)


def hidden_for(size: int) -> int:
    """Units of each of two hidden layers with which a model has at least `size` bytes of float32."""
    outside = FEATURES + CLASSES + 2
    least = size / 4 - CLASSES
    return math.ceil((-outside + math.sqrt(outside**2 + 4 * least)) / 2)


class Bench:
    """One coordinator, one run, some clients in step.

    Args:
        coordinator: under test; options: of the command line.
    """

    def __init__(self, coordinator: Coordinator, watch: Watch, options: argparse.Namespace) -> None:
        self.coordinator, self.watch, self.options = coordinator, watch, options
        self.seconds: dict[str, list[float]] = {name: [] for name in (*PHASES, *BARE)}
        self.taken = {name: [0.0, 0.0] for name in self.seconds}  # processor time: serving side, this side
        self.size = self.peak = 0

    async def run(self) -> Memory:
        """Do all rounds; the memory of the coordinator before the first transfer."""
        options, at = self.options, self.coordinator
        operator_fleet, fleet = FakeFleet(at.address, at.ca, {}), FakeFleet(at.address, at.ca, at.tokens)
        operator = Operator(operator_fleet.channel(), "operator", at.operator)
        await operator.enter()
        units = hidden_for(options.bytes)
        model = {"name": "mlp", "hidden": [units, units]}
        run = await operator.submit(synthetic(options.clients, model, options.rounds), "transfer")
        await operator.until(run.run_id, lambda r: r.detail.startswith("waiting"))
        await asyncio.sleep(1.0)
        baseline = memory(at.pid)
        forget_peak(at.pid)
        self.watch.enter("plan")
        # Two clients, two connections.
        for number, (name, token) in enumerate(at.tokens.items()):
            fleet.nodes.append(FakeNode(fleet.channel(), name, token, seed=number))
        await asyncio.gather(*(node.enter() for node in fleet.nodes))
        bare: BareStream | None = None
        self.bare_pid = 0
        try:
            leased = await self._leased(fleet.nodes, "plan")
            self.size = leased[0].message.size
            bare = BareStream(
                at.folder / "tls", size=self.size, chunk_bytes=fleet.nodes[0].limits.chunk_bytes
            )
            self.bare_pid = bare.pid
            for number in range(options.rounds):
                await self._timed("bare_down", bare.down(options.clients))
                await self._round(fleet.nodes, leased)
                await self._timed("bare_up", bare.up(options.clients))
                await self._timed("bare_kept", bare.kept(options.clients))
                if number + 1 < options.rounds:
                    leased = await self._leased(fleet.nodes, "aggregate")
                print(f"round {number + 1} of {options.rounds}", flush=True)
            (last,) = await self._timed("finish", operator.until(run.run_id, lambda r: r.state == "ok"))
            self.peak = peak(at.pid)
            if last.rounds_done != options.rounds:
                raise RuntimeError(f"{last.rounds_done} of {options.rounds} rounds were done")
        finally:
            self.watch.enter("")
            if bare is not None:
                await bare.close()
            await fleet.close()
            await operator_fleet.close()
        return baseline

    async def _round(self, nodes: list[FakeNode], leased: list[pb.Task]) -> None:
        pairs = list(zip(nodes, leased, strict=True))
        await self._timed("down", *(node.fetch(task.message, checked=False) for node, task in pairs))
        await self._timed("down_checked", *(node.fetch(task.message) for node, task in pairs))
        self.watch.enter("")
        updates = [await asyncio.to_thread(node.update_for, task) for node, task in pairs]
        threes = list(zip(nodes, leased, updates, strict=True))
        ids = await self._timed("up", *(node.upload(task, update) for node, task, update in threes))
        verdicts = await self._timed(
            "submit",
            *(n.submit(t, u, i) for (n, t, u), i in zip(threes, ids, strict=True)),
        )
        if any(reply.verdict != pb.ACCEPTED for reply in verdicts):
            raise RuntimeError(f"an update was not accepted: {verdicts}")

    async def _leased(self, nodes: list[FakeNode], phase: str) -> list[pb.Task]:
        """The task of every node; the coordinator plans it, and before that folds the round before."""

        async def one(node: FakeNode) -> pb.Task:
            while (found := await node.lease()) is None:
                pass
            return found[0]

        found: list[pb.Task] = await self._timed(phase, *(one(node) for node in nodes))
        return found

    async def _timed(self, phase: str, *work: Any) -> list[Any]:
        self.watch.enter("" if phase.startswith("bare") else phase)
        serving = self.bare_pid if phase.startswith("bare") else self.coordinator.pid
        taken = cpu_seconds(serving), time.process_time()
        began = time.perf_counter()
        found = await asyncio.gather(*work)
        self.seconds[phase].append(time.perf_counter() - began)
        self.taken[phase][0] += cpu_seconds(serving) - taken[0]
        self.taken[phase][1] += time.process_time() - taken[1]
        return found


def summary(bench: Bench, baseline: Memory, disk: float) -> dict[str, Any]:
    """Rates as bytes per second over all clients, memory as multiples of the model."""
    moved = bench.size * bench.options.clients
    rate = {n: moved / statistics.median(s) for n, s in bench.seconds.items() if n in RATED}
    growth = {
        phase: {
            name: (now - before) / bench.size
            for name, now, before in zip(Memory._fields, peak, baseline, strict=True)
        }
        for phase, peak in bench.watch.peaks.items()
    }
    return {
        "model_bytes": bench.size,
        "clients": bench.options.clients,
        "rounds": bench.options.rounds,
        "rates": rate,
        "shares": {way: share(bench.seconds, way) for way in TRANSFER},
        "share_of_kept": share(bench.seconds, "up", "bare_kept"),
        "disk_bytes_per_second": disk,
        "seconds": bench.seconds,
        "cpu_seconds_per_gigabyte": {
            n: [1e9 * cpu / moved / bench.options.rounds for cpu in bench.taken[n]] for n in RATED
        },
        "baseline_bytes": baseline._asdict(),
        "growth": growth,
        "growth_peak": (bench.peak - baseline.total) / bench.size,
        "within_phase": {phase: bytes_ / bench.size for phase, bytes_ in bench.watch.grown.items()},
    }


def share(seconds: dict[str, list[float]], way: str, bare: str = "") -> float:
    """Part of the bare stream's rate, the median over the rounds: each beside its own bare stream."""
    beside = seconds[bare or ("bare_up" if way == "up" else "bare_down")]
    return statistics.median(b / own for b, own in zip(beside, seconds[way], strict=True))


def show(found: dict[str, Any]) -> None:
    rates, seconds = found["rates"], found["seconds"]
    size, disk = found["model_bytes"] / 1e6, found["disk_bytes_per_second"] / 1e6
    print(f"\nmodel of {size:.1f} MB, {found['clients']} clients at a time, {found['rounds']} rounds")
    print(f"the disk takes {disk:.0f} MB/s with a sync every 8 MiB\n")
    rows = []
    for way in TRANSFER:
        part = found["shares"][way]
        bare = rates["bare_up" if way == "up" else "bare_down"]
        rows.append((
            way.replace("_", ", "), f"{rates[way] / 1e6:.0f}", f"{bare / 1e6:.0f}", f"{part:.0%}",
            "yes" if part >= RATE_WANTED else "no",
        ))  # fmt: skip
    print(table(("way", "MB/s", "bare MB/s", "share", f"at least {RATE_WANTED:.0%}"), rows))
    kept = rates["bare_kept"] / 1e6
    print(f"\na bare stream that is also hashed, written and synced: {kept:.0f} MB/s,", end=" ")
    print(f"of which the uploads reach {found['share_of_kept']:.0%}")
    print("\nprocessor seconds for a gigabyte:\n")
    spent = found["cpu_seconds_per_gigabyte"]
    print(
        table(
            ("way", "serving side", "clients"),
            [(way.replace("_", ", "), *(f"{cpu:.2f}" for cpu in spent[way])) for way in RATED],
        )
    )
    print()
    rows = [
        (
            phase,
            f"{statistics.median(seconds[phase]):.2f}",
            f"{found['within_phase'][phase]:.2f}",
            *(f"{grown[n]:.2f}" for n in Memory._fields),
        )
        for phase, grown in found["growth"].items()
    ]
    head = ("phase", "seconds", "growth in it", "peak over baseline", "of it anonymous", "of it mapped files")
    print("resident memory of the coordinator, in models:\n")
    print(table(head, rows))
    grown = found["growth_peak"]
    enough = "yes" if grown < MEMORY_WANTED else "no"
    print(f"\npeak growth as the kernel counts it {grown:.2f} x model, below {MEMORY_WANTED}: {enough}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", type=int, default=100_000_000, help="size of the model")
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the coordinator's state lies (a new one)")
    parser.add_argument("--json", type=Path, help="result file (beside this module)")
    options = parser.parse_args()
    facts = machine()
    with tempfile.TemporaryDirectory(prefix="fedsim-bench-", dir=options.folder) as folder:
        disk = disk_bytes_per_second(Path(folder))
        names = [f"client-{number}" for number in range(options.clients)]
        with Coordinator(Path(folder), names) as coordinator, Watch(coordinator.pid) as watch:
            bench = Bench(coordinator, watch, options)
            baseline = asyncio.run(bench.run())
            found = summary(bench, baseline, disk)
    show(found)
    keep(options.json, __file__, {"machine": facts, **found})


if __name__ == "__main__":
    main()
