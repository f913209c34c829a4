"""Memory of large transfers, given back to the operating system once they are over.

Chunks of a transfer are allocated by many threads. glibc has up to eight arenas a core for them and keeps
what they free at the top of each: what one round left there would stay beside the model of the next.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

_ARENA_MAX, _ARENAS = -8, 2  # of <malloc.h>; a second one, so that a thread seldom waits for another


def share_arenas() -> bool:
    """Let all threads that begin from now on share two arenas of the C library.

    Returns:
        Whether it did; False where it is not glibc.
    """
    setting = _function("mallopt")
    return setting is not None and setting(_ARENA_MAX, _ARENAS) == 1


def trim() -> bool:
    """Give back what the C library holds and nobody uses; some milliseconds.

    Returns:
        Whether there was anything to give back; False where the C library is not glibc.
    """
    release = _function("malloc_trim")
    return release is not None and release(0) == 1


@cache
def _function(name: str) -> Any:  # a function of the C library, None where it has none of this name
    return getattr(ctypes.CDLL(None), name, None)
