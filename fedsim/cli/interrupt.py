"""Ctrl-C once ends a run after the round it is in; twice stops at once."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_on_signal(told: Callable[[], None]) -> Iterator[Callable[[], bool]]:
    """Give a function that says whether a stop was asked for, by SIGINT or SIGTERM.

    The second signal raises KeyboardInterrupt where the program is; what was committed stays.

    Args:
        told: called at the first signal, inside the handler.
    """
    asked = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        told()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
