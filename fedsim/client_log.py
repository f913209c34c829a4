"""What happened to each client of a window, for ``clients.jsonl``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from fedsim.types import Floats, Ids, UpdateBlock

Column = Sequence[Any] | np.ndarray  # Any: numbers, words, None


@dataclass(slots=True)
class ClientLog:
    """What happened to each client of a window, for ``clients.jsonl``; filled block by block."""

    parts: list[dict[str, Column]] = field(default_factory=list)  # of equally long columns each

    def add(
        self,
        block: UpdateBlock,
        reasons: Sequence[str | None] | None,
        norms: Floats | None,
        bytes_up: int,
        *,
        staleness: Ids | None = None,
    ) -> None:
        """The clients of one block; `reasons` [b] of those that were refused, None where nobody was."""
        verdicts = ["accepted"] * len(block)
        if reasons is not None:
            verdicts = ["accepted" if reason is None else "refused" for reason in reasons]
        part: dict[str, Column] = {
            "client": block.ids,
            "verdict": verdicts,
            "examples": block.examples,
            "steps": block.local_steps,
            "seconds": block.train_seconds,
            "bytes_up": [bytes_up] * len(block),
        }
        if norms is not None:
            part["norm"] = norms
        part |= block.metrics
        if staleness is not None:
            part["staleness"] = staleness
        if reasons is not None:
            part["reason"] = list(reasons)
        self.parts.append(part)

    def add_missing(self, client: int, verdict: str, reason: str) -> None:
        self.parts.append({"client": [client], "verdict": [verdict], "reason": [reason]})

    @property
    def troubles(self) -> list[tuple[int, str]]:
        """(client, reason) of each line that has a reason."""
        return [
            (client, reason)
            for part in self.parts
            for client, reason in zip(listed(part["client"]), part.get("reason", ()), strict=False)
            if reason is not None
        ]

    @property
    def columns(self) -> dict[str, list[Any]]:
        """Equally long columns of plain values, None where a client has no such value."""
        return {name: listed(column) for name, column in self.as_held.items()}

    @property
    def as_held(self) -> dict[str, Column]:
        """The same, numbers of a window's only part still as arrays."""
        if len(self.parts) == 1:
            return dict(self.parts[0])
        names = dict.fromkeys(name for part in self.parts for name in part)
        return {name: list(chain(*(_entries(part, name) for part in self.parts))) for name in names}


def _entries(part: dict[str, Column], name: str) -> list[Any]:
    return listed(part[name]) if name in part else [None] * len(part["client"])


def listed(column: Column) -> list[Any]:
    """Plain numbers and words."""
    return column.tolist() if isinstance(column, np.ndarray) else list(column)
