"""The database role of the workers sees the queue and nothing else."""

from __future__ import annotations

from pathlib import Path

import psycopg
import pytest

from tpv_service import migrate
from tpv_service.embedded.postgres import WORKER_RIGHTS, temporary_postgres

DOCKER = Path(__file__).parents[3] / "docker/queue-role.sql"


def test_workers_see_the_queue_and_nothing_else():
    with temporary_postgres() as postgres:
        migrate.upgrade(postgres.url.replace("postgresql://", "postgresql+psycopg://"))
        assert postgres.worker_url() == postgres.worker_url()  # as often as `tpv up` starts
        with psycopg.connect(postgres.worker_url(), autocommit=True) as connection:
            connection.execute("set search_path = procrastinate")
            assert connection.execute("select * from procrastinate_register_worker_v1()").fetchone() == (1,)
            assert connection.execute("select count(*) from procrastinate_jobs").fetchone() == (0,)
            tables = connection.execute("select tablename from pg_tables where schemaname = 'public'").fetchall()
            assert {("tokens",), ("jobs",), ("workers",), ("checkpoints",)} <= set(tables)
            for (table,) in tables:
                for words in ("select 1 from public.", "delete from public."):
                    with pytest.raises(psycopg.errors.InsufficientPrivilege):
                        connection.execute((words + table).encode())
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute("create table public.mine ()")


def test_the_roles_of_both_ways_to_run_have_the_same_rights():
    granted = [line.removesuffix(";") for line in DOCKER.read_text().splitlines() if line.startswith("grant")]
    assert granted == list(WORKER_RIGHTS)
