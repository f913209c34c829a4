"""What alembic runs for each command: the connection is given by `fedsim.server.migrate`."""

from __future__ import annotations

from functools import partial

from alembic import context

from fedsim.server.tables import metadata

_configure = partial(context.configure, target_metadata=metadata, transactional_ddl=True)


def run() -> None:
    """Run the steps on the connection in ``attributes``, or print them where alembic is offline."""
    given = context.config.attributes
    if context.is_offline_mode():
        _configure(dialect_name=given["dialect"])
    else:
        _configure(connection=given["connection"])
    with context.begin_transaction():
        context.run_migrations()


run()
