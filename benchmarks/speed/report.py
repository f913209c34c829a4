"""What the measurement found: numbers of each program, the table, the JSON file, the plot, the check."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.speed.plan import Plan
from benchmarks.speed.runner import Measured

WORSE = 0.15  # a ratio that has fallen by more is a defect
Values = dict[str, Any]


def numbers(one: Measured, plan: Plan | None, *, clients: int) -> Values:
    """What is kept of one program.

    Args:
        plan: what the rounds cost, where it follows a plan; clients: of a cohort.
    """
    plain = one.plain
    evaluated = [s for s, e in zip(one.seconds, one.evaluated, strict=True) if e]
    median = statistics.median(plain)
    found: Values = {
        "rounds": len(plain),
        "first": one.first,
        "median": median,
        "min": min(plain),
        "max": max(plain),
        "with_evaluation": statistics.median(evaluated) if evaluated else None,
        "updates_per_second": clients / median,
        "cpu_seconds": one.cpu / one.counted,
        "startup": one.startup,
        "peak_mb": one.peak / 1e6 if one.peak else None,
        **{k: one.facts[k] for k in ("engine", "block", "workers", "reason", "version") if k in one.facts},
    }
    if plan is not None:
        # Round 0 was the first; rounds differ in examples, so each has its own rate.
        rates = [plan.gflop(r + 1) / s for r, s in enumerate(one.seconds) if not one.evaluated[r]]
        found["gflops"] = statistics.median(rates)
    return found


def difference(found: Mapping[str, Any] | None, reference: Mapping[str, Any] | None) -> float | None:
    """Relative difference of two global models in the L2 norm; None where one is unknown."""
    if found is None or reference is None or set(found) != set(reference):
        return None
    a, b = (np.concatenate([m[n].ravel().astype(np.float64) for n in sorted(m)]) for m in (found, reference))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def compare(programs: dict[str, Values], reference: str) -> None:
    """Write each program's ratio to the reference: how many times as fast, by clock and by processor time."""
    base = programs[reference]
    for values in programs.values():
        values["ratio"] = base["median"] / values["median"]
        values["cpu_ratio"] = base["cpu_seconds"] / values["cpu_seconds"] if values["cpu_seconds"] else None


def machine() -> Values:
    """Facts without which numbers say nothing."""
    import torch

    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")), "")
    return {
        "processor": model or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 2),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def table(programs: Mapping[str, Values]) -> str:
    """The numbers as a Markdown table."""
    head = ("program", "start-up s", "first s", "median s", "min", "max", "ratio", "updates/s", "CPU s",
            "CPU ratio", "GFLOP/s", "of peak", "PSS MB", "after 1", "at end")  # fmt: skip
    rows: list[Sequence[str]] = [
        (
            name,
            _number(v["startup"]),
            _number(v["first"]),
            _number(v["median"]),
            _number(v["min"]),
            _number(v["max"]),
            _number(v.get("ratio")),
            f"{v['updates_per_second']:,.0f}"
            if v["updates_per_second"] > 99
            else _number(v["updates_per_second"]),
            _number(v["cpu_seconds"]),
            _number(v.get("cpu_ratio")),
            _number(v.get("gflops")),
            "" if v.get("of_peak") is None else f"{v['of_peak']:.1%}",
            "" if v["peak_mb"] is None else f"{v['peak_mb']:.0f}",
            *("" if v.get(name) is None else f"{v[name]:.0e}" for name in ("difference_first", "difference")),
        )
        for name, v in programs.items()
    ]
    cells = [head, *rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    return "\n".join([lines[0], "| " + " | ".join("-" * w for w in widths) + " |", *lines[1:]])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def keep(path: Path, key: str, result: Values) -> None:
    """Put a result under its key into a JSON file; the other keys stay."""
    document = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    document[key] = result
    path.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def regressions(key: str, programs: Mapping[str, Values], committed: Path) -> list[str]:
    """Sentences about ratios that have fallen by more than 15 %.

    Raises:
        SystemExit: the file has nothing to compare with.
    """
    before = json.loads(committed.read_text(encoding="utf-8")).get(key, {}).get("programs", {})
    both = [name for name in programs if name.startswith("fedsim") and name in before]
    if not both:
        raise SystemExit(f"{committed} has no fedsim program of {key} that was measured now")
    return [
        f"{key}, {name}: {programs[name]['ratio']:.2f} times the loop, was {before[name]['ratio']:.2f}"
        for name in both
        if programs[name]["ratio"] < (1 - WORSE) * before[name]["ratio"]
    ]


def draw(path: Path, title: str, programs: Mapping[str, Values]) -> None:
    """Medians as points on a logarithmic axis, with the range from least to most.

    Points and not bars: a logarithmic axis has no zero from which a length could be read.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure, axes = plt.subplots(figsize=(7, 0.9 + 0.42 * len(programs)), layout="constrained")
    for place, (name, v) in enumerate(programs.items()):
        colour = "tab:blue" if name.startswith("fedsim") else "tab:grey"
        axes.plot([v["min"], v["max"]], [place, place], color=colour, linewidth=1)
        axes.plot(v["median"], place, "o", color=colour)
        note = f"{v['median']:.3g} s" + (f", {v['ratio']:.2g}x" if v.get("ratio") is not None else "")
        axes.annotate(note, (v["median"], place - 0.18), ha="center", va="bottom", fontsize=8)
    axes.set_yticks(range(len(programs)), list(programs))
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.08)
    axes.set_ylim(len(programs) - 0.5, -0.7)
    axes.grid(axis="x", linewidth=0.3)
    axes.set_xlabel("seconds per round: median, least to most; ratio to the sequential loop")
    axes.set_title(title, fontsize=9)
    figure.savefig(path)
    plt.close(figure)
