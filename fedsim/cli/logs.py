"""The log on stderr, for those who ask for it with ``-v``."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from fedsim.cli.settings import Settings


@contextmanager
def log_to_stderr(settings: Settings) -> Iterator[None]:
    """Show fedsim's log: warnings always, the rounds with ``-v``, every client with ``-vv``."""
    log = logging.getLogger("fedsim")
    level = {0: logging.WARNING, 1: logging.INFO}.get(max(0, settings.verbosity), logging.DEBUG)
    shown = logging.StreamHandler()
    shown.setLevel(logging.ERROR if settings.quiet else level)
    shown.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    before = log.level
    # The file of the run holds the rounds whatever is shown here.
    log.setLevel(min(level, logging.INFO))
    log.addHandler(shown)
    try:
        yield
    finally:
        log.removeHandler(shown)
        log.setLevel(before)
