"""Files are named after their one subject and stay readable."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.packaging.source_tree import MAPPED, ROOT

NAMELESS = {"base", "common", "helper", "helpers", "manager", "managers", "misc", "util", "utils"}
FOLDERS = [*MAPPED.values(), "proto", "tests", "examples", "benchmarks"]
LONGEST_LINES = 500


def python_files() -> list[Path]:
    """Python files of the project's own hand; the links inside fedsim/ are not followed."""
    links = {ROOT / "fedsim" / folder for folder in MAPPED.values()}
    return sorted(
        file
        for folder in FOLDERS
        for file in (ROOT / folder).rglob("*.py")
        if "pb" not in file.parts and not links & set(file.parents)
    )


def complaints(file: Path, lines: int) -> list[str]:
    nameless = {part for part in file.with_suffix("").parts for word in part.split("_") if word in NAMELESS}
    wrong = [f"{file}: the name {name!r} says nothing" for name in sorted(nameless)]
    if lines > LONGEST_LINES:
        wrong.append(f"{file}: {lines} lines, more than one subject")
    return wrong


def test_no_file_has_a_name_that_says_nothing_or_too_many_lines() -> None:
    files = python_files()
    assert len(files) > 20, "the walk found too few files to mean anything"
    found = []
    for file in files:
        lines = len(file.read_text(encoding="utf-8").splitlines())
        found += complaints(file.relative_to(ROOT), lines)
    assert found == []


@pytest.mark.parametrize(
    ("path", "lines"),
    [("fedsim/utils.py", 10), ("fedsim/data/image_helpers.py", 10), ("fedsim/common/x.py", 1), ("a.py", 501)],
)
def test_a_bad_file_is_noticed(path: str, lines: int) -> None:
    assert complaints(Path(path), lines)


def test_a_good_file_is_let_through() -> None:
    assert complaints(Path("fedsim/rounds.py"), 300) == []
