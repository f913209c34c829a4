"""constraints.txt fixes every package that an installation brings, within what pyproject.toml allows."""

from __future__ import annotations

import importlib.metadata
import re

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.packaging.source_tree import PROJECT, ROOT

PINNED: dict[str, str] = {
    canonicalize_name(name): version
    for name, version in re.findall(
        r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE
    )
}
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
DIRECT = [Requirement(line) for line in PROJECT["project"]["dependencies"]]
# An extra may take another one in by naming the project itself.
OPTIONAL = [r for lines in EXTRAS.values() for r in map(Requirement, lines) if r.name != "fedsim"]

# Exact pins of torch's own metadata, only where its build brings an accelerator.
BY_TORCH = re.compile(r"^(nvidia-.*|cuda-.*|triton)$")


def closure(requirements: list[Requirement]) -> set[str]:
    """Every distribution that these bring here, as far as it is installed."""
    seen: set[tuple[str, str]] = set()
    todo = [(r, "") for r in requirements]
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        for wanted in ("", *requirement.extras):
            if (name, wanted) in seen:
                continue
            seen.add((name, wanted))
            try:
                needs = importlib.metadata.requires(name) or []
            except importlib.metadata.PackageNotFoundError:
                continue
            todo += [(Requirement(line), wanted) for line in needs]
    return {name for name, _ in seen}


def test_every_line_is_a_comment_or_one_exact_version() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert len(pins) == len(PINNED)
    assert pins == sorted(pins)


def test_torch_is_the_version_that_brings_no_accelerator_libraries() -> None:
    assert PINNED["torch"] == "2.13.0"


@pytest.mark.parametrize("requirement", DIRECT + OPTIONAL, ids=str)
def test_a_requirement_of_the_project_allows_the_version_that_is_fixed(requirement: Requirement) -> None:
    assert PINNED[canonicalize_name(requirement.name)] in requirement.specifier


def test_what_the_requirements_bring_themselves_is_fixed_too() -> None:
    found = closure(DIRECT + [Requirement(line) for line in EXTRAS["dev"]])
    assert len(found) > 60, "the walk found too little to mean anything"
    loose = {name for name in found if name not in PINNED and not BY_TORCH.match(name)}
    assert loose == {"fedsim"}
