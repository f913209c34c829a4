"""Clients whose answers did not count, with the reason: what a report never hides."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from fedsim.runs.folder import CLIENTS
from fedsim.runs.lines import scan

COUNTED = "accepted"


class Trouble(NamedTuple):
    """One client, one verdict, one reason.

    Args:
        client: its number; name: "" where clients have none.
        verdict: ``refused``, ``lost``, ``late`` …; reason: as the run gave it.
        rounds: in which it happened, ascending.
    """

    client: int
    name: str
    verdict: str
    reason: str
    rounds: list[int]


def troubles(run: Path, names: Mapping[int, str] | None = None) -> list[Trouble]:
    """Everything in ``clients.jsonl`` that was not accepted, the most frequent first.

    Args:
        names: of clients, by number.
    """
    found: dict[tuple[int, str, str], list[int]] = {}
    for record, _ in scan(run / CLIENTS, skip=f'"verdict": {json.dumps(COUNTED)}'.encode()):
        if record.get("verdict") != COUNTED:
            key = (int(record["client"]), str(record.get("verdict")), str(record.get("reason") or ""))
            found.setdefault(key, []).append(int(record["round"]))
    named = names or {}
    result = [
        Trouble(client, named.get(client, ""), verdict, reason, rounds)
        for (client, verdict, reason), rounds in found.items()
    ]
    return sorted(result, key=lambda t: (-len(t.rounds), t.client, t.verdict, t.reason))


def counts(found: list[Trouble]) -> dict[str, int]:
    """Answers by verdict: ``{"refused": 3, "lost": 1}``."""
    sums: dict[str, int] = {}
    for trouble in found:
        sums[trouble.verdict] = sums.get(trouble.verdict, 0) + len(trouble.rounds)
    return dict(sorted(sums.items()))
