"""Check a finished run: do its files match their digests, and do its first rounds come out again?"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

from fedsim.runs import lines
from fedsim.runs.folder import RunFolder
from fedsim.simulation.session import again


class Difference(NamedTuple):
    """A value that a repeated round gave differently."""

    round: int
    key: str
    recorded: Any
    repeated: Any


def repeat(folder: RunFolder, *, rounds: int, **objects: Any) -> list[Difference]:
    """Run the first `rounds` rounds again and compare every field but ``time``.

    Args:
        objects: the Python objects that the run was made of.

    Raises:
        ConfigError: the run was made of Python objects and they are not given.
    """
    recorded = folder.records()
    sim = again(folder, **objects)
    differences: list[Difference] = []
    repeated = itertools.takewhile(lambda r: r["round"] <= rounds, sim)
    for old, new in zip(recorded, repeated, strict=False):
        new = lines.ordered(new, lines.ROUND_KEYS, tail=lines.ROUND_TAIL)
        for key in sorted({*old, *new} - {"time"}):
            if old.get(key) != new.get(key):
                differences.append(Difference(old["round"], key, old.get(key), new.get(key)))
    return differences
