"""The schema of the database: which one it has, which ones this program knows, and the way up.

Alembic is set up here and not by a file ``alembic.ini``: the steps are part of the installed package.
"""

from __future__ import annotations

import io
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

_STEPS = Path(__file__).parent / "migrations"


def newest() -> str:
    """The schema that this program works with."""
    head = ScriptDirectory.from_config(_config()).get_current_head()
    assert head is not None, "the package holds no migrations"
    return head


def known() -> frozenset[str]:
    """Every schema that this program can bring up to `newest`."""
    return frozenset(step.revision for step in ScriptDirectory.from_config(_config()).walk_revisions())


def found(connection: Connection) -> str | None:
    """The schema of a database, or None where it has none of ours."""
    heads = MigrationContext.configure(connection).get_current_heads()
    return ", ".join(sorted(heads)) or None


def upgrade(connection: Connection) -> None:
    """Bring the database to `newest`, inside the transaction of the caller."""
    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def as_sql(dialect: str) -> str:
    """The statements that make `newest` from nothing, for ``sqlite`` or ``postgresql``."""
    config = _config(output := io.StringIO())
    config.attributes["dialect"] = dialect
    command.upgrade(config, "head", sql=True)
    return output.getvalue()


def _config(output: io.StringIO | None = None) -> Config:
    config = Config(output_buffer=output)
    # Values go through interpolation: a per cent sign in the path must not be one.
    config.set_main_option("script_location", str(_STEPS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config
