"""The state folder of a coordinator that is not running, opened for its owner: the local administrator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from fedsim.identity import Key
    from fedsim.server.nodes import Nodes


class Local(NamedTuple):
    """The state folder of a coordinator, opened for its owner."""

    nodes: Nodes
    key: Key


@contextmanager
def opened(state: Path | None, config: Path | None) -> Iterator[Local]:
    """The state folder of a coordinator that is not running.

    Raises:
        EnvironmentProblem: FS-LED-007, it is running; and whatever else `open_database` refuses.
    """
    from fedsim.server.audit import Audit
    from fedsim.server.database import open_database
    from fedsim.server.ledger_errors import LedgerInUse
    from fedsim.server.nodes import Nodes
    from fedsim.server.settings import load_settings
    from fedsim.server.state_keys import AUDIT, server_key

    url = ""
    if config is not None:
        loaded = load_settings(config)
        state, url = loaded.server.state, loaded.database.url or ""
    assert state is not None
    try:
        database = open_database(url, state)
    except LedgerInUse as error:
        error.hint = "the coordinator is running: ask it with --connect, or stop it first"
        raise
    try:
        audit = Audit(state / AUDIT)
        try:
            yield Local(Nodes(database, audit), server_key(state, database))
        finally:
            audit.close()
    finally:
        database.close()
