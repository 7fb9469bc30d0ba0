"""Runs the migrations on a connection that the caller has opened, inside the caller's transaction.

`registry.database.upgrade` passes the connection, so that a migration is whole or absent on both databases and two
processes cannot migrate at once. Authors of migrations run `alembic -x url=URL revision --autogenerate`; it opens one.
"""

from alembic import context
from sqlalchemy import Connection, create_engine

from registry.database import parse_url
from registry.schema import Base


def run(connection: Connection) -> None:
    """Migrate on this connection."""
    context.configure(
        connection=connection, target_metadata=Base.metadata, transactional_ddl=True, compare_server_default=True
    )
    with context.begin_transaction():
        context.run_migrations()


given = context.config.attributes.get("connection")
if given is not None:
    run(given)
else:
    with create_engine(parse_url(context.get_x_argument(as_dictionary=True)["url"])).begin() as opened:
        run(opened)
