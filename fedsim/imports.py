"""Large imports without the garbage collector, which would look at every module's objects again and again.

To import torch makes some 250,000 objects and drops next to none. Collections that find nothing took a fifth
of the time until the first round.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected(*, keep: bool = False) -> Iterator[None]:
    """No collection while modules are imported; afterwards the collector is as it was.

    Args:
        keep: never look at what is alive now again, if anything was imported: modules live as long as the
            program. For programs of our own, as garbage that others have left by now is kept too.
    """
    was, loaded = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if keep and len(sys.modules) > loaded:
            gc.freeze()
        if was:
            gc.enable()
