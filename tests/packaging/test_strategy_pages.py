"""Every strategy has a page, and what a page says of parameters, costs and commands is so."""

from __future__ import annotations

import importlib.util
import inspect
import re
import shlex
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedsim.build import build_scheduler, build_strategy
from fedsim.config import load_config
from fedsim.registry import load
from tests.packaging.source_tree import PROJECT, ROOT

STRATEGIES = sorted(PROJECT["project"]["entry-points"]["fedsim.strategies"])
DOCS = ROOT / "docs"
INDEX = (DOCS / "strategies.md").read_text(encoding="utf-8")
each = pytest.mark.parametrize("name", STRATEGIES)


def generator() -> types.ModuleType:
    """``benchmarks.strategy_pages``; the folder is no package of the distribution."""
    found = importlib.util.spec_from_file_location(
        "strategy_pages", ROOT / "benchmarks" / "strategy_pages.py"
    )
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


PAGES = generator()


def page(name: str) -> str:
    path = DOCS / "strategies" / f"{name}.md"
    assert path.is_file(), f"write {path.relative_to(ROOT)}; every registered strategy has a page"
    return path.read_text(encoding="utf-8")


def tables(text: str) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Header and rows of every Markdown table, cells without blanks around them."""
    for block in re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE):
        lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in block.splitlines()]
        cells = [[cell.strip() for cell in line] for line in lines]
        yield cells[0], cells[2:]


def options(text: str) -> dict[str, str]:
    """Parameter -> default as a page's table of options writes it."""
    found: dict[str, str] = {}
    for header, rows in tables(text):
        if header[0] != "option":
            continue
        column = header.index("default")
        for row in rows:
            names = re.findall(r"`(\w+)`", row[0])
            written = row[column].split(", ") if len(names) > 1 else [row[column]]
            if len(written) != len(names):
                written = [row[column]] * len(names)
            found |= dict(zip(names, written, strict=True))
    return found


def says(written: str, default: object, parameter: str) -> bool:
    """Whether a cell of the table states this default.

    A default of None stands for something that words describe: any words but a value will do. ``as
    `fedavg` `` stands for the default of that strategy.
    """
    same = re.fullmatch(r"as `(\w+)`", written)
    if same is not None:
        return bool(inspect.signature(load("strategies", same[1])).parameters[parameter].default == default)
    word = written.replace("`", "").strip('"')
    if default is None:
        return not re.fullmatch(r"[\d.e+-]+|true|false", word)
    if isinstance(default, bool):
        return word == str(default).lower()
    if isinstance(default, int | float):
        return bool(re.fullmatch(r"-?[\d.]+(?:e-?\d+)?", word)) and float(word) == default
    return word == str(default)


def commands(text: str) -> list[list[str]]:
    """The words of every ``fedsim run`` that stands indented on a page, continued lines joined."""
    joined = text.replace("\\\n", " ")
    return [
        shlex.split(line, comments=True)[2:]
        for line in re.findall(r"^ {4}(fedsim run .*|fedsim run)$", joined, re.MULTILINE)
    ]


def sets(words: list[str]) -> list[str]:
    return [words[at + 1] for at, word in enumerate(words) if word == "--set"]


def test_the_table_of_all_strategies_has_each_of_them_once_and_links_its_page() -> None:
    assert sorted(PAGES.ROW.findall(INDEX)) == STRATEGIES
    assert sorted(PAGES.own()) == STRATEGIES
    assert sorted(path.stem for path in (DOCS / "strategies").glob("*.md")) == STRATEGIES


def test_the_table_says_what_the_traits_say() -> None:
    assert PAGES.written_index(INDEX) == INDEX, "run python -m benchmarks.strategy_pages"


@each
def test_a_page_says_what_the_traits_say(name: str) -> None:
    assert PAGES.written_page(page(name), name) == page(name), "run python -m benchmarks.strategy_pages"


@each
def test_a_page_names_every_parameter_with_the_default_of_its_factory(name: str) -> None:
    defaults = {p.name: p.default for p in inspect.signature(load("strategies", name)).parameters.values()}
    written = options(page(name))
    assert set(written) == set(defaults)
    wrong = {
        key: (cell, defaults[key]) for key, cell in written.items() if not says(cell, defaults[key], key)
    }
    assert wrong == {}


@each
def test_a_page_has_the_name_the_algorithm_and_a_paper(name: str) -> None:
    text = page(name)
    assert re.match(rf"# .*`{name}`\n", text)
    assert re.search(r"^ {4}.*server", text, re.MULTILINE), "no algorithm box"
    assert re.search(r"\b(19|20)\d\d, \*", text), "no work is cited"


@each
def test_the_example_of_a_page_is_a_configuration_of_its_strategy(name: str) -> None:
    found = commands(page(name))
    assert found, f"the page of {name} has no command"
    for words in found:
        config = load_config(sets=sets(words)).config
        assert config.strategy.name == name
        clients = config.data.partition.clients
        assert clients is not None
        build_scheduler(config, clients, build_strategy(config))


@pytest.mark.parametrize("file", ["asynchronous.md", "participation.md", "strategies.md"])
def test_the_commands_of_the_other_pages_can_be_configured(file: str) -> None:
    for words in commands((DOCS / file).read_text(encoding="utf-8")):
        config = load_config(sets=sets(words)).config
        build_scheduler(config, config.data.partition.clients or 1, build_strategy(config))


@pytest.mark.parametrize("file", [DOCS / "strategies.md", DOCS / "asynchronous.md", DOCS / "README.md"])
def test_every_link_of_a_page_leads_to_a_file(file: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", file.read_text(encoding="utf-8"))
    assert targets
    assert [target for target in targets if not (file.parent / target).exists()] == []


@pytest.mark.parametrize(
    ("written", "default"),
    [("0.1", 0.2), ("`true`", False), ("`a`", "b"), ("0.5", None), ("as `fedavg`", 2.0), ("of it", 1.0)],
)
def test_a_wrong_default_is_noticed(written: str, default: Any) -> None:
    assert not says(written, default, "server_lr")


@pytest.mark.parametrize(
    ("written", "default"),
    [("0.10", 0.1), ("1e-3", 0.001), ("false", False), ('`"a"`', "a"), ("none", None), ("as `fedavg`", 1.0)],
)
def test_a_right_default_is_let_through(written: str, default: Any) -> None:
    assert says(written, default, "server_lr")


def test_a_block_that_was_typed_by_hand_and_a_page_without_markers_are_noticed() -> None:
    text = page("scaffold")
    assert PAGES.written_page(text.replace("| 8 D |", "| 4 D |", 1), "scaffold") == text
    with pytest.raises(ValueError, match="needs one line"):
        PAGES.written_page("# SCAFFOLD: `scaffold`\n", "scaffold")
