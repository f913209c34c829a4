"""A strategy from another distribution runs by its name, in both engines, through the command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.packaging.source_tree import ROOT

SETTINGS = [
    *("data.partition.clients=6", "round.sample=4", "client.epochs=1"),
    *("strategy.name=fedmedian", "strategy.mu=0.05", "output.plots=false", "output.report=false"),
]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, built as a distribution and installed into a folder of its own."""
    place = tmp_path_factory.mktemp("plugin")
    # pip builds inside the source folder; a copy keeps the repository clean.
    shutil.copytree(ROOT / "examples" / "fedmedian_plugin", place / "source")
    words = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *words, "--target", place / "site", place / "source"],
        check=True,
        stdin=subprocess.DEVNULL,
    )
    return place / "site"


def fedsim(*arguments: str, site: Path | None, folder: Path) -> subprocess.CompletedProcess[str]:
    code = "import sys; from fedsim.cli import main; sys.exit(main())"
    environment = {**os.environ, "NO_COLOR": "1"}
    if site is not None:
        environment["PYTHONPATH"] = str(site)
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def run(engine: str, site: Path, folder: Path) -> dict[str, Any]:
    words = [word for setting in SETTINGS for word in ("--set", setting)]
    done = fedsim(
        *("run", "--engine", engine, "--format", "json", "--set", "run.rounds=3", *words),
        site=site,
        folder=folder,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    assert answer["status"] == "ok"
    data: dict[str, Any] = answer["data"]
    return data


def test_a_strategy_of_another_distribution_runs_in_both_engines(installed: Path, tmp_path: Path) -> None:
    results = {engine: run(engine, installed, tmp_path) for engine in ("loop", "stacked")}
    for engine, result in results.items():
        assert result["outcome"] == "ok"
        assert result["rounds"] == 3
        config = (tmp_path / result["path"] / "config.toml").read_text(encoding="utf-8")
        assert 'name = "fedmedian"' in config
        assert f'name = "{engine}"' in config
    losses = {engine: result["final"]["loss"] for engine, result in results.items()}
    # The same numbers up to the float32 rounding of batched matrix products.
    assert losses["stacked"] == pytest.approx(losses["loop"], rel=1e-3)


def test_its_parameters_are_shown_and_checked_like_those_of_a_built_in_one(
    installed: Path, tmp_path: Path
) -> None:
    shown = fedsim("plugins", "show", "fedmedian", site=installed, folder=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "server_lr" in shown.stdout
    words = ["--set", "strategy.name=fedmedian", "--set", "strategy.mi=0.1"]
    refused = fedsim("run", *words, site=installed, folder=tmp_path)
    assert refused.returncode == 2
    assert "did you mean `mu`" in refused.stderr
    assert not (tmp_path / "runs").exists()


def test_without_the_distribution_its_name_is_unknown(tmp_path: Path) -> None:
    refused = fedsim("run", "--set", "strategy.name=fedmedian", site=None, folder=tmp_path)
    assert refused.returncode == 2
    assert "fedmedian" in refused.stderr
