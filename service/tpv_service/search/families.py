"""Keeps the copies of families of vectors up to date with Postgres: `Families.current` is as new as a query would be.

What is new is found by transaction numbers, not by ids or times: rows become visible in the order of their commits,
which is not the order in which ids were given. A look at the database remembers a *horizon*, below which every
transaction had ended; the next look takes all rows written by transactions from there on, and passes over those that
it has.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import psycopg
import structlog
from psycopg import sql
from sqlalchemy import Uuid, bindparam, text
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from starlette.concurrency import run_in_threadpool

from tpv.errors import Unavailable
from tpv_service.db import release
from tpv_service.registry.tables import InitializationRow
from tpv_service.search.family import RECORD, Family, Snapshot

log = structlog.get_logger()

_ROWS_HELD = 4_000_000  #: of all families together; at most 340 bytes of memory each, beside maps and lists of tasks
_FAMILIES_HELD = 100  #: each has two files open
_PATIENCE = 20.0  #: seconds that a query waits for a large family to be read; it goes on without the query
_FEW = 1_000  #: versions, or lists of tasks, that are looked through as fast as a thread takes over
_BLOCK = 1 << 24  #: bytes that are taken over at a time while a family is read

#: The database, and in it the table's file, which another table has when a dump is restored in its place.
_SOURCE = """
    (select system_identifier from pg_control_system()) || '/' ||
    (select timeline_id from pg_control_checkpoint()) || '/' ||
    (select oid from pg_database where datname = current_database()) || '/' || pg_relation_filenode('versions')
"""
# `exists` would say what `limit 1` does, but may read the whole family: the planner takes a third of it to be new.
_LOOK = text(f"""
    select {_SOURCE} as source, pg_snapshot_xmin(pg_current_snapshot())::text::bigint as horizon,
           (select id from versions
            where initialization_id = :family and txid >= cast(cast(:since as text) as xid8) and id <> all(:known)
            order by txid limit 1) is not null as grown,
           array(select distinct vector_id from changes where txid >= cast(cast(:since as text) as xid8)) as changed
""").bindparams(  # noqa: S608 # _SOURCE is the constant above
    bindparam("known", type_=ARRAY(Uuid())), bindparam("family", type_=Uuid())
)
_DELETED = text("""
    select v.id from versions v join vectors w on w.id = v.vector_id
    where v.initialization_id = :family and (v.deleted_at is not null or w.deleted_at is not null)
""").bindparams(bindparam("family", type_=Uuid()))
_STATES = text("""
    select v.id, v.deleted_at is null and w.deleted_at is null from versions v join vectors w on w.id = v.vector_id
    where v.initialization_id = :family and v.vector_id = any(:changed)
""").bindparams(bindparam("changed", type_=ARRAY(Uuid())), bindparam("family", type_=Uuid()))
_TASKS = text("select hash_array_extended(tasks, 0), tasks from vectors where id = any(:vectors)").bindparams(
    bindparam("vectors", type_=ARRAY(Uuid()))
)
_ROWS = sql.SQL("""
    copy (select v.id, v.vector_id, v.number, v.txid, hash_array_extended(w.tasks, 0),
                 v.deleted_at is null and w.deleted_at is null, v.pooled
          from versions v join vectors w on w.id = v.vector_id
          where v.initialization_id = {family} and v.txid >= {since}::text::xid8 and v.id <> all({known}::uuid[]))
    to stdout (format binary)
""")


class Families:
    """The families that this process has a copy of; the ones not asked for longest are closed when they get many."""

    def __init__(self, readers: async_sessionmaker[AsyncSession], directory: Path) -> None:
        self._readers, self._directory = readers, directory
        self._open: OrderedDict[UUID, _Copy] = OrderedDict()
        self._looks: dict[asyncio.Task[Snapshot], _Copy] = {}  #: the copy that each is at, or waits for

    async def current(self, initialization: InitializationRow) -> Snapshot:
        """All versions of the family that are committed now; raises Unavailable when it takes long to read them."""
        copy = self._open.setdefault(initialization.id, _Copy())
        self._open.move_to_end(initialization.id)
        look = asyncio.create_task(self._look(copy, initialization))
        self._looks[look] = copy
        look.add_done_callback(self._close_oldest)
        if not (await asyncio.wait([look], timeout=_PATIENCE))[0]:
            look.add_done_callback(_told)
            raise Unavailable(
                f"the vectors of initialization {initialization.name or initialization.id} are being read, "
                f"{copy.rows} so far; ask again in some seconds"
            )
        return look.result()

    async def _look(self, copy: _Copy, initialization: InitializationRow) -> Snapshot:
        async with copy.lock, self._readers() as session:
            try:
                if copy.family is None:
                    copy.family = await self._begin(session, initialization)
                if not await _catch_up(session, initialization.id, copy.family):
                    copy.family.forget()
                    copy.family = await self._begin(session, initialization)
                    await _catch_up(session, initialization.id, copy.family)
                snapshot = copy.family.snapshot
            except OSError as error:
                copy.family = None
                raise Unavailable(f"the cache directory does not take or give files: {error.strerror}") from error
            except BaseException:
                if copy.family and not copy.family.settled:  # grown half; opened again, it is what its log says
                    copy.family = None
                raise
        return snapshot

    async def _begin(self, session: AsyncSession, initialization: InitializationRow) -> Family:
        source = (await session.execute(text(f"select {_SOURCE}"))).scalar_one()
        await release(session)
        path = self._directory / initialization.id.hex
        family = await run_in_threadpool(Family, path, initialization.token_dim, source)
        if len(family.snapshot):
            deleted = (await session.scalars(_DELETED, {"family": initialization.id})).all()
            await run_in_threadpool(family.set_alive, deleted, [False] * len(deleted))
        return family

    def _close_oldest(self, ended: asyncio.Task[Snapshot]) -> None:
        del self._looks[ended]
        held = sum(copy.rows for copy in self._open.values())
        for key, copy in list(self._open.items())[:-1]:
            if held <= _ROWS_HELD and len(self._open) <= _FAMILIES_HELD:
                break
            if copy not in self._looks.values():  # opened again meanwhile, two copies would write the same files
                held -= copy.rows
                del self._open[key]  # queries that still have its snapshot keep its maps


def _told(look: asyncio.Task[Snapshot]) -> None:
    """Nobody waits for this look any more."""
    if not look.cancelled() and (error := look.exception()):
        log.warning("cannot read a family of vectors", error=repr(error))


class _Copy:
    """A family, or the place of one that is being opened; one task at a time brings it up to date."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.family: Family | None = None

    @property
    def rows(self) -> int:
        return len(self.family.snapshot) if self.family else 0


async def _catch_up(session: AsyncSession, initialization: UUID, family: Family) -> bool:
    """Adds what is new; False when the copy is of a table or time that the database has not, as after a restore."""
    few = family.recent < _FEW
    known = family.since_horizon() if few else await run_in_threadpool(family.since_horizon)
    asked = {"family": initialization, "since": str(family.horizon), "known": known}
    look = (await session.execute(_LOOK, asked)).one()
    if look.source != family.source or look.horizon < family.horizon:
        return False
    if look.grown:
        await _read_rows(session, initialization, family, known)
        await release(session)
        await run_in_threadpool(family.settle)
    untold = [*family.untold.values()]
    for start in range(0, len(untold), _FEW):  # a few at a time, for other requests wait meanwhile
        for hashed, tasks in await session.execute(_TASKS, {"vectors": untold[start : start + _FEW]}):
            family.tell(hashed, tasks)
    if look.changed:
        states = (await session.execute(_STATES, {"family": initialization, "changed": look.changed})).all()
        await run_in_threadpool(family.set_alive, [s[0] for s in states], [s[1] for s in states])
    # Last: a look that breaks off before is taken again from the old horizon, and loses no change.
    if not family.reached:
        await run_in_threadpool(family.reach, look.horizon)
    family.horizon = look.horizon
    return True


async def _read_rows(session: AsyncSession, initialization: UUID, family: Family, known: list[UUID]) -> None:
    """Takes over what is not here yet, in blocks, so that a large family passes through little memory."""
    raw = await (await session.connection()).get_raw_connection()
    connection = raw.driver_connection
    assert isinstance(connection, psycopg.AsyncConnection)
    layout = _layout(family.width)
    statement = _ROWS.format(family=initialization, since=str(family.horizon), known=known)
    # The horizon is the old one until all is here: a look that is broken off must be taken again from there.
    since, content, read = family.horizon, bytearray(), 0
    async with connection.cursor() as cursor, cursor.copy(statement) as copy:
        async for message in copy:
            content += message
            if len(content) > _BLOCK:
                read += await run_in_threadpool(_take, family, content, layout, since)
    read += await run_in_threadpool(_take, family, content, layout, since)
    if read > 10_000:
        log.info("read a family of vectors", initialization=str(initialization), rows=read)


_HEADER = 19  #: bytes before the first row of a binary COPY


def _layout(width: int) -> np.dtype[Any]:
    """A row of a binary COPY: every field is as long in all rows of a family, so rows are read as an array."""
    fields = [("id", "V16"), ("vector", "V16"), ("number", ">i4"), ("txid", ">u8"), ("tasks", ">i8"), ("alive", "?")]
    pooled = np.dtype([("width", ">i2"), ("unused", ">i2"), ("values", ">f4", (width,))])
    parts: list[tuple[str, Any]] = [("fields", ">i2")]
    for name, kind in [*fields, ("pooled", pooled)]:
        parts += [(f"{name} length", ">i4"), (name, kind)]
    return np.dtype(parts)


def _take(family: Family, content: bytearray, layout: np.dtype[Any], horizon: int) -> int:
    """Appends the whole rows in `content` to the family and removes them; what is left begins another row."""
    if content.startswith(b"PGCOPY\n"):
        del content[:_HEADER]
    count = len(content) // layout.itemsize
    if count == 0:
        return 0
    rows = np.frombuffer(bytes(content[: count * layout.itemsize]), layout)
    del content[: count * layout.itemsize]
    if not ((rows["fields"] == 7) & (rows["pooled"]["width"] == family.width)).all():
        raise ValueError("a row of the family has another width than its initialization")
    records = np.zeros(count, RECORD)
    for field in RECORD.names or ():
        records[field] = rows[field]
    pooled = rows["pooled"]["values"].astype(np.float32)
    family.append(records, pooled, rows["alive"].astype(bool), horizon)
    return count


@contextmanager
def cache_directory(root: Path | None) -> Iterator[Path]:
    """A directory for this process alone: below `root` one that a former process has left, else a temporary one."""
    if root is None:
        with tempfile.TemporaryDirectory(prefix="tpv-cache-") as temporary:
            yield Path(temporary)
        return
    for number in range(1000):
        place = root / str(number)
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(place, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another process of this service has it
            os.close(handle)
            continue
        try:
            yield place
        finally:
            os.close(handle)
        return
    raise RuntimeError(f"{root} is in use by a thousand processes")
