"""What several tests of the coordinator begin with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gate import Clock, Gate


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make_gate(tmp_path: Path, clock: Clock) -> Iterator[Callable[..., Gate]]:
    """Makes gates, and closes them."""
    made: list[Gate] = []

    def gate(**options: Any) -> Gate:
        made.append(Gate(tmp_path / f"state-{len(made)}", clock, **options))
        return made[-1]

    yield gate
    for each in made:
        each.close()


@pytest.fixture
def gate(make_gate: Callable[..., Gate]) -> Gate:
    return make_gate()
