"""How Alembic runs here: one connection, one transaction, one migrating process at a time."""

from alembic import context
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from tpv_service.tables import Table

LOCK = 4_927_113_801  # any number that only this project's migrations lock


engine = create_engine(
    context.config.attributes["database_url"], poolclass=NullPool, connect_args={"options": "-c lock_timeout=10s"}
)
with engine.connect() as connection:
    connection.execute(text("select pg_advisory_lock(:key)"), {"key": LOCK})
    connection.commit()
    context.configure(
        connection=connection,
        target_metadata=Table.metadata,
        compare_type=True,
        compare_server_default=True,
        # Made by a running service for large families: see tpv_service.search.indexes.
        include_name=lambda name, kind, parents: not (kind == "index" and (name or "").startswith("search_")),
    )
    with context.begin_transaction():
        context.run_migrations()
    connection.commit()
engine.dispose()
