"""The database: one engine, one transaction a request, committed at the edge before the answer is sent."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

import numpy as np
import pgvector
import pgvector.sqlalchemy
import psycopg
from fastapi import Depends, Request
from pgvector.psycopg.vector import VectorBinaryDumper
from sqlalchemy import ColumnElement, DateTime, Dialect, LargeBinary, MetaData, Text, Uuid, func
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.dialects.postgresql.base import ischema_names
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import UserDefinedType
from uuid_utils.compat import uuid7

from tpv_service.settings import Settings

QUEUE_SCHEMA = "procrastinate"  #: the queue's tables and functions live apart from the registry's


class Table(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012 # SQLAlchemy's own declaration
        datetime: DateTime(timezone=True),
        UUID: Uuid(),
        str: Text(),
        list[str]: ARRAY(Text()),
        dict[str, Any]: JSONB(),
        dict[str, str]: JSONB(),
        dict[str, float]: JSONB(),
    }


Id = Annotated[UUID, mapped_column(primary_key=True, default=uuid7)]
psycopg.adapters.register_dumper(pgvector.Vector, VectorBinaryDumper)


class PooledVector(pgvector.sqlalchemy.VECTOR):
    """A float32 array (d,); moved as bytes, for its text is five times as long and takes longer than all the rest."""

    cache_ok = True
    render_bind_cast = True

    def bind_processor(self, dialect: Dialect) -> Any:
        return lambda value: None if value is None else pgvector.Vector(value)

    def column_expression(self, column: ColumnElement[Any]) -> ColumnElement[Any]:
        return func.vector_send(column, type_=_VectorBytes())


class _VectorBytes(LargeBinary):
    """What `vector_send` gives: the width and an unused number of two bytes each, then the values, big-endian."""

    def result_processor(self, dialect: Dialect, coltype: object) -> Any:
        return lambda value: None if value is None else np.frombuffer(value, ">f4", offset=4)


class Xid8(UserDefinedType[str]):
    """A transaction's number, 64 bits, never used twice in one cluster."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "xid8"


ischema_names["xid8"] = Xid8  # for the comparison of tables and migrations

#: The transaction that wrote the row. A reader that knows which transactions had ended when it last looked finds all
#: rows since, in whatever order they were committed; see `tpv_service.search.families`.
WrittenBy = Annotated[Any, mapped_column(Xid8(), server_default=func.pg_current_xact_id(), deferred=True)]

CreatedAt = Annotated[datetime, mapped_column(server_default=func.now())]


class Deletable:
    deleted_at: Mapped[datetime | None]


def create_engine(settings: Settings, **options: Any) -> AsyncEngine:
    """With half of the connections that a process may hold; the other half reads."""
    return create_async_engine(
        settings.database_url.get_secret_value(),
        pool_size=settings.database_connections // 2,
        max_overflow=0,
        pool_timeout=10,  # seconds; then the caller gets a 503
        connect_args={"options": f"-c search_path=public,{QUEUE_SCHEMA}", "connect_timeout": 5},
        **options,
    )


def create_reading_engine(settings: Settings) -> AsyncEngine:
    """For reading alone: every statement stands for itself, without the round trips of BEGIN and COMMIT.

    A transaction would show nothing else: at READ COMMITTED each of its statements has a snapshot of its own too. With
    connections of its own, which are never anything else, none has to be prepared or cleared for the next request, and
    who writes and reads in one request waits for nobody who does the same.
    """
    return create_engine(settings, isolation_level="AUTOCOMMIT", pool_reset_on_return=None)


def create_sessionmaker(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
    return async_sessionmaker(engine, expire_on_commit=False)


async def _session(request: Request) -> AsyncIterator[AsyncSession]:
    """One transaction: commits when the endpoint returned, rolls back when it raised. A GET only reads."""
    sessions: async_sessionmaker[AsyncSession] = (
        request.state.readers if request.method == "GET" else request.state.sessions
    )
    async with sessions() as session:  # closing it rolls back what was not committed
        yield session
        await session.commit()


async def _reader(request: Request) -> AsyncIterator[AsyncSession]:
    async with request.state.readers() as session:
        yield session


# scope="function": the commit comes before the answer, so a commit that fails is a 500 and never a 201.
Session = Annotated[AsyncSession, Depends(_session, scope="function")]
#: Of a POST that only asks: its statements stand for themselves, as those of a GET do.
ReadOnlySession = Annotated[AsyncSession, Depends(_reader, scope="function")]


async def release(session: AsyncSession) -> None:
    """Gives the connection back while files move: a slow blob store must not keep others from the database.

    Ends a transaction that has only read. What it has loaded stays usable; the next statement begins another one.
    """
    if session.in_transaction():
        await session.commit()
