"""What the README shows can be run as it stands, and what it points to exists."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.packaging.source_tree import PROJECT, ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    """The one block of code in this language."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return str(found)


def call(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )


@pytest.mark.parametrize("language", ["python", "toml"])
def test_an_example_has_about_ten_lines(language: str) -> None:
    assert 8 <= len(block(language).split("\n")) <= 14


def test_the_python_example_trains_and_says_where_its_folder_is(tmp_path: Path) -> None:
    done = call("-c", block("python"), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    accuracy, path = done.stdout.splitlines()[-1].split(maxsplit=1)
    assert 0.3 < float(accuracy) <= 1.0
    assert (tmp_path / path / "report.html").is_file()


def test_the_toml_example_trains_with_the_strategy_it_names(tmp_path: Path) -> None:
    text = block("toml")
    (tmp_path / "federation.toml").write_text(text, encoding="utf-8")
    main = "import sys; from fedsim.cli import main; sys.exit(main())"
    done = call("-c", main, "run", "federation.toml", "--format", "json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)["data"]
    assert data["outcome"] == "ok"
    wanted = tomllib.loads(text)
    assert data["rounds"] == wanted["run"]["rounds"]
    resolved = tomllib.loads((tmp_path / data["path"] / "config.toml").read_text(encoding="utf-8"))
    assert resolved["strategy"]["name"] == wanted["strategy"]["name"]
    assert resolved["data"]["partition"].items() >= wanted["data"]["partition"].items()


def test_the_table_names_every_registered_strategy_and_no_other() -> None:
    table = README.partition("## Strategies")[2].partition("\n## ")[0]
    firsts = re.findall(r"^\| (`[^|]+) \|", table, re.MULTILINE)
    named = {name for cell in firsts for name in re.findall(r"`(\w+)`", cell)}
    assert named == set(PROJECT["project"]["entry-points"]["fedsim.strategies"])


def test_the_table_of_defaults_is_the_default_configuration() -> None:
    from fedsim.config import load_config

    table = README.partition("## The default")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([\w.]+)` \| `([^`]+)` \|$", table, re.MULTILINE)
    assert len(rows) > 8
    config = load_config(None, preset=None, sets=(), environ={}).config
    for key, shown in rows:
        value: object = config
        for part in key.split("."):
            value = getattr(value, part)
        assert str(value) == shown, key


def test_every_file_and_folder_it_points_to_exists() -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", README)
    targets += re.findall(r"`((?:docs|examples|tests|fedsim|strategies|\.ci)/[\w./-]*)`", README)
    targets += re.findall(r"`([A-Z]+[A-Z.]*(?:\.md|\.cff)?|constraints\.txt)`", README)
    assert len(targets) > 5
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_citation_and_the_list_of_changes_are_of_this_version() -> None:
    import fedsim

    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {fedsim.__version__}\n" in citation
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\n## {fedsim.__version__}" in changes
