"""Every error code has a page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedsim.errors import (
    ConfigError,
    DataError,
    EnvironmentProblem,
    FedsimError,
    Interrupted,
    ModelError,
    RegistryError,
    RunFailed,
)
from fedsim.explain import AREAS, as_markdown, page, pages

FOLDERS = ("fedsim", "client", "server", "strategies")


def codes_in_the_tree(root: Path) -> set[str]:
    found: set[str] = set()
    for folder in FOLDERS:
        for file in (root / folder).rglob("*.py"):
            found |= set(re.findall(r"FS-[A-Z]{3}-\d{3}", file.read_text(encoding="utf-8")))
    return found


def test_every_code_in_the_tree_has_a_page_and_every_page_a_code(repository: Path) -> None:
    assert codes_in_the_tree(repository) == {p.code for p in pages()}


@pytest.mark.parametrize(
    ("area", "error"),
    [
        ("CFG", ConfigError), ("REG", RegistryError), ("DAT", DataError), ("MOD", ModelError),
        ("RUN", RunFailed), ("INT", Interrupted), ("ENV", EnvironmentProblem),
    ],
)  # fmt: skip
def test_the_exit_code_of_an_area_is_that_of_its_errors(area: str, error: type[FedsimError]) -> None:
    assert AREAS[area][1] == error.exit_code
    assert error.default_code.startswith(f"FS-{area}-")


def test_a_code_is_found_however_it_is_written() -> None:
    assert page("FS-CFG-004") == page("cfg-4") == page("fs-cfg-004")


def test_an_unknown_code_is_refused_with_near_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        page("FS-CFG-400")
    assert caught.value.code == "FS-CFG-021"


def test_pages_fit_on_a_terminal() -> None:
    for p in pages():
        assert p.title[0].islower() or p.title[0] in "[-", p.code
        assert max(len(line) for line in p.lines()) <= 100, p.code


def test_the_documentation_is_written_from_the_pages(repository: Path) -> None:
    written = (repository / "docs" / "errors.md").read_text(encoding="utf-8")
    assert written == as_markdown(), "run: fedsim explain --markdown > docs/errors.md"
