"""Approximate search in large families: an HNSW index of pgvector for each, built beside everything else.

Recall is that of the index; the similarities in an answer are exact, for what the index finds is compared again with
the vectors themselves. Where a family's copy is multiplied as fast, there is no index.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from hashlib import sha256
from uuid import UUID

import numpy as np
import pgvector
import structlog
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from tpv_service.registry.tables import InitializationRow
from tpv_service.search.family import Float32
from tpv_service.settings import Settings

log = structlog.get_logger()

LOCK = 4_927_113_802  #: any number that only the building of these indexes locks
VECTOR_WIDTH, HALF_WIDTH = 2000, 4000  #: the widest that pgvector's HNSW takes of `vector` and of `halfvec`
WORTH = 25  #: times the size from which there may be an index: below it, to compare all takes some tenths of a second
TRIALS = 20  #: different queries of which `auto` compares an index's answers with exact ones before it trusts it
TRUSTED = 0.95  #: of the exact hits; among vectors that have no near neighbours, a graph finds hardly any
_PAUSE = 600.0  #: seconds until an index that could not be built is asked for again
_HALF_LARGEST = 65_504  #: the largest number of half precision

_VALID = text("select indexrelid from pg_index where indexrelid = to_regclass(:name) and indisvalid")


def name_of(initialization: UUID) -> str:
    """The index of a family; migrations leave names of this form alone."""
    return f"search_{initialization.hex}"


def expression(width: int) -> tuple[str, str]:
    """What is indexed, and by which operators: in half precision, and the first 4000 numbers, where no more fits.

    A vector that is longer than half precision holds is indexed at the greatest length that fits: what the index
    does not take could not be registered. Among such vectors the index ranks by direction alone.
    """
    if width <= VECTOR_WIDTH:
        return f"(pooled::vector({width}))", "vector_ip_ops"
    kept = min(width, HALF_WIDTH)
    part = "pooled" if width <= HALF_WIDTH else f"subvector(pooled, 1, {HALF_WIDTH})"
    cut = f"l2_normalize({part}) * array_fill({_HALF_LARGEST}::real, array[{kept}])::vector"
    fitting = f"case when vector_norm({part}) > {_HALF_LARGEST} then {cut} else {part} end"
    return f"(({fitting})::halfvec({kept}))", "halfvec_ip_ops"


def shortlist(width: int, k: int) -> int:
    """How many the index is asked for, so that after the comparison with the vectors the best k are among them."""
    return k + 20 if width <= VECTOR_WIDTH else max(100, 4 * k)  # some may be deleted, or not the newest


class Indexes:
    """Builds the indexes of this database, one at a time among all processes of the service."""

    def __init__(
        self,
        settings: Settings,
        sessions: async_sessionmaker[AsyncSession],
        readers: async_sessionmaker[AsyncSession],
    ) -> None:
        self.above = settings.search_index_above
        self._memory = settings.search_index_memory
        self._sessions, self._readers = sessions, readers
        self._valid: dict[UUID, int | None] = {}  #: the index that each family was seen to have, by its oid
        self._wanted: asyncio.Queue[InitializationRow] = asyncio.Queue()
        self._asked: set[UUID] = set()
        self._trials: dict[tuple[UUID, int], dict[bytes, float]] = {}

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Indexes]:
        building = asyncio.create_task(self._build_wanted())
        try:
            yield self
        finally:
            building.cancel()
            await asyncio.wait([building])

    async def ready(self, session: AsyncSession, initialization: InitializationRow, rows: int) -> bool:
        """Whether the family has an index; a large one without gets it some time later."""
        if rows * initialization.token_dim < self.above:
            return False
        if not self._valid.get(initialization.id):
            self._seen(initialization.id, await session.scalar(_VALID, {"name": name_of(initialization.id)}))
        ready = bool(self._valid.get(initialization.id))
        if not ready and initialization.id not in self._asked:
            self._asked.add(initialization.id)
            self._wanted.put_nowait(initialization)
        return ready

    def _seen(self, initialization: UUID, index: int | None) -> None:
        """Takes note of the index that a family has; another one than before is tried anew."""
        if index != self._valid.get(initialization):
            self._valid[initialization] = index
            self._trials = {key: trial for key, trial in self._trials.items() if key[0] != initialization}

    def trusted(self, initialization: UUID, rows: int) -> bool | None:
        """Whether the index of a family finds what an exact search finds; None while that is being tried.

        It is tried anew when the number of rows has passed a power of two.
        """
        trials = self._trials.get((initialization, rows.bit_length()), {})
        return None if len(trials) < TRIALS else sum(trials.values()) / len(trials) >= TRUSTED

    def tried(self, initialization: UUID, rows: int, pooled: Float32, recall: float) -> None:
        """Takes note of the share of an exact answer that the index gave, too, for one query (d,) of a family."""
        trials = self._trials.setdefault((initialization, rows.bit_length()), {})
        if len(trials) < TRIALS:
            trials[sha256(pooled.tobytes()).digest()] = recall  # asked again, the same query says nothing new
            if len(trials) == TRIALS:
                log.info(
                    "compared an index with exact answers",
                    initialization=str(initialization),
                    recall=sum(trials.values()) / len(trials),
                    used=self.trusted(initialization, rows),
                )

    async def nearest(
        self, initialization: InitializationRow, pooled: Float32, *, count: int, ef_search: int
    ) -> Sequence[UUID] | None:
        """About `count` versions of the family with the largest product with `pooled` (d,), best first.

        None when the index cannot be used, for somebody has dropped it; asked for again, it is made again.
        """
        indexed, _ = expression(initialization.token_dim)
        value = indexed.replace("pooled", "cast(:pooled as vector)")
        async with self._sessions.begin() as session:  # the settings hold for its transaction
            # From some ef_search on the planner would rather read and sort the whole family, which takes far longer.
            index, *_ = (
                await session.execute(
                    text("""
                        select (select indexrelid from pg_index where indexrelid = to_regclass(:name) and indisvalid),
                               set_config('hnsw.ef_search', :ef_search, true),
                               set_config('hnsw.iterative_scan', 'relaxed_order', true),
                               set_config('enable_seqscan', 'off', true), set_config('enable_sort', 'off', true)
                    """),
                    {"name": name_of(initialization.id), "ef_search": str(ef_search)},
                )
            ).one()
            self._seen(initialization.id, index)
            if index is None:
                return None
            # The family as a literal: a parameter would not tell the planner that the index is the family's.
            found = await session.execute(
                text(f"""
                    select id from versions where initialization_id = '{initialization.id}'
                    order by {indexed} <#> {value} limit :count
                """),  # noqa: S608 # a UUID and numbers of our own
                # Scaled, the order is the same, and half precision is never exceeded.
                {"pooled": pgvector.Vector(pooled / (np.abs(pooled).max() or 1)), "count": count},
            )
            return list(found.scalars())

    async def _build_wanted(self) -> None:
        while True:
            initialization = await self._wanted.get()
            try:
                await self._build(initialization)
            except Exception as error:  # searches stay exact; after a pause, one that misses the index asks again
                log.warning("cannot build an index", initialization=str(initialization.id), error=repr(error))
                asyncio.get_running_loop().call_later(_PAUSE, self._asked.discard, initialization.id)
            else:
                self._asked.discard(initialization.id)

    async def _build(self, initialization: InitializationRow) -> None:
        async with self._readers() as session:
            if not (await session.execute(text("select pg_try_advisory_lock(:key)"), {"key": LOCK})).scalar_one():
                return  # another process builds one; a later search asks again
            try:
                if not await session.scalar(_VALID, {"name": name_of(initialization.id)}):
                    await self._build_now(session, initialization)
                await session.execute(text("select pg_advisory_unlock(:key)"), {"key": LOCK})
            finally:
                # The connection ends, and with it these settings, and a lock that is still held. A statement that takes
                # them back would fail where the building was cancelled, and its error replace the cancellation.
                await session.invalidate()

    async def _build_now(self, session: AsyncSession, initialization: InitializationRow) -> None:
        name, (indexed, operators) = name_of(initialization.id), expression(initialization.token_dim)
        log.info("building an index", initialization=str(initialization.id))
        # One that a crash has left half built cannot be used, nor made again under its name.
        await session.execute(text(f"drop index concurrently if exists {name}"))
        await session.execute(text(f"set maintenance_work_mem = '{self._memory // 1024}kB'"))
        # Else gigabytes wait to be written, and a registration's commit behind them.
        await session.execute(text("set backend_flush_after = '1MB'"))
        await session.execute(
            text(f"""
                create index concurrently {name} on versions using hnsw ({indexed} {operators})
                where initialization_id = '{initialization.id}'
            """)
        )
        log.info("built an index", initialization=str(initialization.id))
