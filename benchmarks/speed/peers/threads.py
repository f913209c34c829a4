"""How many cores a peer may use: set before its library is loaded, which asks only once."""

from __future__ import annotations

import os


def limit(count: int) -> None:
    """Use so many cores, by affinity: JAX sizes its pool by it and has no other switch that holds."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[:count])
    os.environ["OMP_NUM_THREADS"] = str(count)
