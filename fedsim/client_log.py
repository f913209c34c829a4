"""What happened to each client of a window, for ``clients.jsonl``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from fedsim.types import Floats, Ids, UpdateBlock


@dataclass(slots=True)
class ClientLog:
    """What happened to each client of a window, for ``clients.jsonl``; filled block by block."""

    parts: list[dict[str, list[Any]]] = field(default_factory=list)  # Any: columns differ in type

    def add(
        self,
        block: UpdateBlock,
        reasons: Sequence[str | None] | None,
        norms: Floats,
        bytes_up: int,
        *,
        staleness: Ids | None = None,
    ) -> None:
        """The clients of one block; `reasons` [b] of those that were refused, None where nobody was."""
        verdicts = ["accepted"] * len(block)
        if reasons is not None:
            verdicts = ["accepted" if reason is None else "refused" for reason in reasons]
        part: dict[str, list[Any]] = {
            "client": block.ids.tolist(),
            "verdict": verdicts,
            "examples": block.examples.tolist(),
            "steps": block.local_steps.tolist(),
            "norm": norms.tolist(),
            "seconds": block.train_seconds.tolist(),
            "bytes_up": [bytes_up] * len(block),
            **{name: values.tolist() for name, values in block.metrics.items()},
        }
        if staleness is not None:
            part["staleness"] = staleness.tolist()
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
            for client, reason in zip(part["client"], part.get("reason", ()), strict=False)
            if reason is not None
        ]

    @property
    def columns(self) -> dict[str, list[Any]]:
        """Equally long columns, None where a client has no such value."""
        names = dict.fromkeys(name for part in self.parts for name in part)
        return {
            name: list(chain(*(part.get(name) or [None] * len(part["client"]) for part in self.parts)))
            for name in names
        }
