"""``python -m benchmarks.speed --workload W1``: one workload, all programs by turns, in one run.

    python -m benchmarks.speed --workload W4 --engine loop --engine stacked
    python -m benchmarks.speed --workload W1 --data DIR --engine fused --workers 2 --json FILE --plot FILE.svg
    python -m benchmarks.speed --workload W1 --data DIR --peers pfl --peer-python pfl=/path/to/python
    python -m benchmarks.speed --population 1000 --population 1000000 --cohort 100

``--engine NAME,key=value`` sets further keys of ``[engine]`` for this one. ``docs/performance.md`` says how
to read what is printed.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.speed import report
from benchmarks.speed.options import arguments
from benchmarks.speed.plan import Plan, make_plan
from benchmarks.speed.programs import configurations, fedsim_programs, other_programs
from benchmarks.speed.runner import ROOT, Measured, by_turns, peak_memory
from benchmarks.speed.workloads import WORKLOADS, population
from fedsim.errors import FedsimError


def joined(runs: list[list[Measured]]) -> list[Measured]:
    """Repeats as one: all their rounds, the median start-up and first round."""
    found = []
    for same in zip(*runs, strict=True):
        one = same[0]
        one.startup = sorted(m.startup for m in same)[len(same) // 2]
        one.first = sorted(m.first for m in same)[len(same) // 2]
        for other in same[1:]:
            one.seconds += other.seconds
            one.evaluated += other.evaluated
            one.cpu += other.cpu
            one.counted += other.counted
        found.append(one)
    return found


def measure_memory(found: list[Measured], folder: Path, rounds: int) -> None:
    """A further, untimed run of each program."""
    for one in found:
        one.peak = peak_memory(one.program, folder, rounds=rounds)


def run_workload(options: argparse.Namespace, folder: Path) -> int:
    """Everything by turns; the exit status."""
    workload = WORKLOADS[options.workload]
    rounds = options.rounds or workload.rounds
    configs = configurations(workload, options, folder)
    facts, early = report.machine(), gemm_peak()
    plan = make_plan(next(iter(configs.values())), folder, rounds + 1)
    programs = [*other_programs(plan, options), *fedsim_programs(configs, folder, options.profile)]
    runs: list[list[Measured]] = []
    models: dict[str, dict[str, Any]] = {}
    for _ in range(options.repeats):
        seen, models = by_turns(programs, folder, rounds=rounds, turn=options.turn or workload.turn)
        runs.append(seen)
    measured = joined(runs)
    if not options.no_memory:
        measure_memory(measured, folder, min(rounds, 3))
    gemm = {threads: max(early[threads], late) for threads, late in gemm_peak().items()}
    loops = [m for m in measured if m.program.name.startswith("Seq")]
    reference = min(loops, key=lambda m: report.numbers(m, None, clients=1)["median"]).program.name
    found: dict[str, dict[str, Any]] = {}
    for one in measured:
        name = one.program.name
        found[name] = report.numbers(one, _repeated(plan, options.repeats, rounds), clients=plan.clients)
        found[name]["of_peak"] = found[name]["gflops"] / gemm["2"]
        found[name]["difference_first"] = report.difference(models[name]["first"], models[reference]["first"])
        found[name]["difference"] = report.difference(models[name]["last"], models[reference]["last"])
    report.compare(found, reference)
    key = "/".join([workload.name, options.strategy, *options.set])
    print(f"\n{workload.name}: {workload.title}; {options.strategy}, {plan.parameters:,} parameters")
    print(
        f"{facts['processor']}, {facts['cores']} cores, load {facts['load_before']}; float32 GEMM "
        f"{gemm['1']:.0f} GFLOP/s on one thread, {gemm['2']:.0f} on two; ratios to {reference}\n"
    )
    print(report.table(found))
    result = {
        "workload": workload.name,
        "strategy": options.strategy,
        "title": workload.title,
        "machine": facts,
        "gemm_gflops": gemm,
        "reference": reference,
        "programs": found,
    }
    return finish(options, key, f"{workload.name}: {workload.title}", result)


def _repeated(plan: Plan, repeats: int, rounds: int) -> Plan:
    """The plan for the rounds of all repeats in a row."""
    return plan._replace(examples=plan.examples[:1] + plan.examples[1 : rounds + 1] * repeats)


def run_populations(options: argparse.Namespace, folder: Path) -> int:
    """fedsim alone, by turns with different numbers of registered clients."""
    facts = report.machine()
    configs = {}
    for clients in options.population:
        workload = population(clients, options.cohort)
        for name, config in configurations(workload, options, folder).items():
            configs[f"{name} {clients:,} clients"] = config
    programs = fedsim_programs(configs, folder, options.profile)
    base = WORKLOADS["W4"]
    rounds = options.rounds or base.rounds
    runs = [by_turns(programs, folder, rounds=rounds, turn=options.turn or base.turn)[0]
            for _ in range(options.repeats)]  # fmt: skip
    measured = joined(runs)
    if not options.no_memory:
        measure_memory(measured, folder, min(rounds, 3))
    found = {m.program.name: report.numbers(m, None, clients=options.cohort) for m in measured}
    report.compare(found, programs[0].name)
    print(f"\n{options.cohort:,} clients a round, {options.strategy}; ratios to the first line\n")
    print(report.table(found))
    for name, values in found.items():
        print(f"{name}: {1 / values['median']:.1f} rounds/s")
    key = "/".join(["population", str(options.cohort), options.strategy, *options.set])
    result = {"cohort": options.cohort, "machine": facts, "programs": found}
    return finish(options, key, f"W4's model, {options.cohort:,} clients a round", result)


def gemm_peak() -> dict[str, float]:
    """GFLOP/s on one thread and on two, measured in a process of its own."""
    words = [sys.executable, "-m", "benchmarks.speed.gemm"]
    found: dict[str, float] = json.loads(subprocess.check_output(words, cwd=ROOT, text=True))
    return found


def finish(options: argparse.Namespace, key: str, title: str, result: dict[str, Any]) -> int:
    """JSON, plot and check, as asked for."""
    worse = report.regressions(key, result["programs"], options.check) if options.check else []
    if options.json:
        report.keep(options.json, key, result)
    if options.plot:
        report.draw(options.plot, title, result["programs"])
    for sentence in worse:
        print(f"slower than it was: {sentence}", file=sys.stderr)
    return 1 if worse else 0


def main() -> int:
    """Run what the command line asks for."""
    options = arguments(__doc__).parse_args()
    if (options.workload is None) == (not options.population):
        raise SystemExit("give --workload NAME or --population N")
    if options.profile and (options.json or options.check):
        raise SystemExit("a traced run is slower: measure without --profile")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the folder goes and the children end
    with tempfile.TemporaryDirectory(prefix="fedsim-speed-", dir=options.scratch) as folder:
        try:
            return (run_populations if options.population else run_workload)(options, Path(folder))
        except FedsimError as error:
            raise SystemExit(str(error)) from error


if __name__ == "__main__":
    sys.exit(main())
