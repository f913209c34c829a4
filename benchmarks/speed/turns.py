"""What a measured child process and the process that leads it say to each other: lines of JSON on two pipes.

The leader writes ``{"rounds": 5}``; the child runs so many rounds and answers with the seconds of each.
Between its turns a child waits on its pipe and takes no processor time. Standard output of the child is
sent to standard error, as libraries print what they like. This file imports nothing but the standard
library: peers read it in interpreters of their own.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any


class Turns:
    """A child's end of the two pipes; made before any library is imported, so that none prints into it."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def say(self, **values: Any) -> None:
        """One line to the leader."""
        self._answers.write(json.dumps(values) + "\n")
        self._answers.flush()

    def hear(self) -> dict[str, Any] | None:
        """What the leader wants next, None when it has gone."""
        line = sys.stdin.readline()
        return json.loads(line) if line else None

    def serve(self, one_round: Callable[[int], Any], save: Callable[[str], None] | None = None) -> None:
        """Answer the leader's wishes with a function that runs round 0, 1, 2 …

        Args:
            save: writes the global model to a path.
        """
        done = 0
        while (wish := self.hear()) is not None:
            seconds = []
            for _ in range(wish.get("rounds", 0)):
                began = time.perf_counter()
                one_round(done)
                seconds.append(time.perf_counter() - began)
                done += 1
            if "save" in wish:
                if save is not None:
                    save(wish["save"])
                self.say(saved=save is not None)
            else:
                self.say(seconds=seconds, evaluated=[False] * len(seconds))
