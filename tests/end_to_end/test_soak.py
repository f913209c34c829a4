"""A coordinator process under a fleet of fake clients: what it keeps must not grow with the rounds.

The fleet, the coordinator and the measuring are those of the benchmarks (docs/deployment-speed.md), run as
commands; what is asserted is results and structure, never a time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
WARM = 5


def benchmark(name: str, result: Path, *arguments: str, seconds: float) -> dict[str, Any]:
    """The JSON that ``python -m benchmarks.deployment.NAME`` writes."""
    command = [sys.executable, "-m", f"benchmarks.deployment.{name}", "--json", str(result), *arguments]
    folder = ("--folder", str(result.parent))
    done = subprocess.run(
        [*command, *folder], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=seconds,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    found: dict[str, Any] = json.loads(result.read_text())
    return found


@pytest.mark.slow
def test_a_fleet_of_200_over_20_rounds_leaves_memory_descriptors_and_database_as_they_were(
    tmp_path: Path,
) -> None:
    found = benchmark("throughput", tmp_path / "soak.json", "--clients", "200", "--rounds", "20", seconds=600)
    assert found["verdicts"] == {"ACCEPTED": 200 * 20}
    assert found["received"] == 200 * 20
    rounds = [held for held in found["held"][:-1]]
    assert [held["round"] for held in rounds] == list(range(20))
    assert abs(found["rss_drift"]) < 0.05
    # Connections of operators and threads' first database connections come and go.
    assert found["descriptors_most"] - found["descriptors_least"] <= 6
    # Nothing of a round is kept for good but its record; the log of SQLite may be at any length.
    updates = 200 * found["update_bytes"]
    assert found["database_most"] - found["database_after_warming"] < 3 * updates


@pytest.mark.big
def test_a_model_of_3_gib_goes_to_a_client_and_back_and_is_folded(tmp_path: Path) -> None:
    found = benchmark(
        "transfer", tmp_path / "big.json", "--bytes", str(3 << 30), "--clients", "1", "--rounds", "1",
        seconds=3600,
    )  # fmt: skip
    assert found["model_bytes"] >= 3 << 30
    assert found["rounds"] == 1
    # While it is on the way, no copy of the model is made.
    for phase in ("down", "down_checked", "up"):
        assert found["within_phase"][phase] < 1.0
