"""The migrations give what the tables say, and can be taken back."""

from __future__ import annotations

import psycopg
import pytest
from alembic import command

from tpv_service import migrate


@pytest.fixture
def url(own_database_url: str) -> str:
    return own_database_url.replace("postgresql://", "postgresql+psycopg://")


def test_the_models_and_the_migrations_agree(url):
    command.check(migrate.config(url))  # raises when Alembic would generate something


def test_every_migration_can_be_taken_back_and_applied_again(url, own_database_url):
    migrate.downgrade(url, "base")
    assert not migrate.is_current(url)
    with psycopg.connect(own_database_url) as connection:
        left = connection.execute(
            "select table_schema, table_name from information_schema.tables"
            " where table_schema not in ('pg_catalog', 'information_schema')"
        ).fetchall()
    assert left == [("public", "alembic_version")]

    migrate.upgrade(url)
    assert migrate.is_current(url)


def test_applying_them_twice_changes_nothing(url):
    migrate.upgrade(url)

    assert migrate.is_current(url)
