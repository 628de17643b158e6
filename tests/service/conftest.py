"""Real Postgres for every test of the service; one server a session, emptied after each test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from uuid import uuid4

import httpx
import psycopg
import pytest
from fastapi import FastAPI
from pydantic import SecretStr

import tpv
from tpv_service import migrate
from tpv_service.app import create_app
from tpv_service.embedded.postgres import temporary_postgres
from tpv_service.settings import Settings


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A server whose database `tpv` has the schema."""
    with temporary_postgres() as postgres:
        migrate.upgrade(postgres.url.replace("postgresql://", "postgresql+psycopg://"))
        yield postgres.url


@pytest.fixture
def database_url(postgres_url: str) -> Iterator[str]:
    """The migrated database, emptied after each test: ten times as fast as a copy for each."""
    yield postgres_url
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("""
            select pg_terminate_backend(pid) from pg_stat_activity
            where datname = current_database() and pid <> pg_backend_pid()
        """)
        tables = connection.execute("""
            select string_agg(format('delete from %I.%I', schemaname, tablename), '; ') from pg_tables
            where schemaname in ('public', 'procrastinate') and tablename <> 'alembic_version'
        """).fetchone()
        assert tables
        # Without triggers, so in any order; to truncate makes a new file of each table and each index.
        connection.execute(f"set session_replication_role = replica; {tables[0]}".encode())


@pytest.fixture
def own_database_url(postgres_url: str) -> Iterator[str]:
    """A copy of the database for a test that changes its schema."""
    name = f"test_{uuid4().hex}"
    admin = postgres_url.replace("/tpv?", "/postgres?")
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute(f"create database {name} template tpv strategy file_copy".encode())
    yield postgres_url.replace("/tpv?", f"/{name}?")
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute(f"drop database {name} with (force)".encode())


@pytest.fixture(scope="session")
def _blobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("blobs")


@pytest.fixture
def blob_directory(_blobs: Path) -> Iterator[Path]:
    """Emptied after each test: making its 256 folders anew and removing them takes longer than most tests."""
    yield _blobs
    for blob in (*_blobs.glob("??/*"), *_blobs.glob("scratch/??/*")):
        blob.unlink()


@pytest.fixture
def settings(database_url: str, blob_directory: Path) -> Settings:
    return Settings(
        database_url=SecretStr(database_url),
        blob_directory=blob_directory,
        authentication=False,
        database_connections=5,
    )


@pytest.fixture(scope="session")
def _applications() -> list[tuple[Settings, FastAPI]]:
    return []


def _application(settings: Settings, made: list[tuple[Settings, FastAPI]]) -> FastAPI:
    """One for all tests with equal settings: to make it, and to work out its routes, takes longer than most tests."""
    for known, app in made:
        if known == settings:
            return app
    app = create_app(settings)
    made.append((settings, app))
    return app


@pytest.fixture
async def app(settings: Settings, _applications: list[tuple[Settings, FastAPI]]) -> AsyncIterator[FastAPI]:
    """The application with its lifespan running."""
    made = _application(settings, _applications)
    async with AsyncExitStack() as stack:
        state = await stack.enter_async_context(made.router.lifespan_context(made))
        yield _WithState(made, state)  # type: ignore[misc]


class _WithState:
    """What a server does with the lifespan's state: hand a copy of it to every request."""

    def __init__(self, app: FastAPI, state: object) -> None:
        self.app, self.state = app, state

    async def __call__(self, scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        scope["state"] = dict(self.state)  # type: ignore[call-overload]
        await self.app(scope, receive, send)


@pytest.fixture
async def http(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """Plain HTTP to the application, for requests that our client would never send."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[tpv.AsyncClient]:
    """The published client on the application: every test of the API tests it too."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with tpv.AsyncClient("http://localhost", transport=transport) as client:
        yield client
