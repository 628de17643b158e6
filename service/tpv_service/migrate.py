"""Brings a database to the schema that this release needs, with Alembic."""

from __future__ import annotations

import time
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool

_HERE = Path(__file__).parent

#: Give rows of a transaction that this cluster has not reached a present one.
_RENEWALS = (
    text("update versions set txid = default where txid >= pg_snapshot_xmax(pg_current_snapshot())"),
    text("update changes set txid = default where txid >= pg_snapshot_xmax(pg_current_snapshot())"),
)


def config(database_url: str) -> Config:
    """Alembic's configuration: the scripts lie in the package when installed, in `migrations/` in a checkout."""
    packaged = _HERE / "migrations"
    found = Config()
    found.set_main_option("script_location", str(packaged if packaged.exists() else _HERE.parents[1] / "migrations"))
    found.attributes["database_url"] = database_url
    return found


def wait_for(database_url: str) -> None:
    """Returns when the database answers, however long it takes: for a process that somebody else ends if need be."""
    engine = create_engine(database_url, poolclass=NullPool)
    while True:
        try:
            engine.connect().close()
        except OperationalError:
            time.sleep(0.03)
        else:
            return


def upgrade(database_url: str, revision: str = "head") -> None:
    """Applies what is missing; does nothing when the database is at `revision`. Concurrent calls take turns.

    Rows of a dump that was restored into a younger cluster carry transactions that this one has not reached. They get a
    present one: a search takes every such row for new, again and again.
    """
    command.upgrade(config(database_url), revision)
    if revision != "head":
        return
    engine = create_engine(database_url, poolclass=NullPool)
    try:
        with engine.begin() as connection:
            for renewal in _RENEWALS:
                connection.execute(renewal)
    finally:
        engine.dispose()


def downgrade(database_url: str, revision: str) -> None:
    """Takes migrations back; data that only the newer schema holds is lost."""
    command.downgrade(config(database_url), revision)


def is_current(database_url: str) -> bool:
    """Whether the database has every migration of this release."""
    engine = create_engine(database_url, poolclass=NullPool)
    try:
        with engine.connect() as connection:
            heads = set(MigrationContext.configure(connection).get_current_heads())
    finally:
        engine.dispose()
    return heads == set(ScriptDirectory.from_config(config(database_url)).get_heads())
