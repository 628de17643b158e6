"""Approximate search: an index that the service builds for a large family, here for a very small one."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import numpy as np
import psycopg
import pytest

import tpv
from tpv import errors
from tpv.schemas.similarity import SearchAnswer
from tpv_service import migrate
from tpv_service.db import create_engine, create_reading_engine, create_sessionmaker
from tpv_service.registry.queries import resolve_initialization
from tpv_service.search import indexes
from tpv_service.settings import Settings

pytestmark = pytest.mark.anyio

COUNT = 30


@pytest.fixture
def database_url(own_database_url: str) -> str:
    """A database that goes away with the indexes made in it."""
    return own_database_url


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"search_index_above": 1})


async def fill(client: tpv.AsyncClient, width: int, count: int = COUNT) -> np.ndarray:
    """`count` vectors `v00`, `v01`, ... of one row each, and a query `q` that is like the first ones most."""
    random = np.random.default_rng(width)
    vectors = random.normal(size=(count, 1, width)).astype(np.float32)
    start = np.zeros((1, width), np.float32)
    await client.initializations.create("family", base_model="tiny-t5", unpinned=True, tensor=start)
    await client.vectors.register_many(
        [{"name": f"v{i:02}"} for i in range(count)], vectors=vectors, initialization="family"
    )
    query = (vectors[:5].sum(axis=0) + 0.1 * random.normal(size=(1, width))).astype(np.float32)
    await client.vectors.register("q", vector=query, initialization="family")
    return vectors


async def approximate(client: tpv.AsyncClient, **options: object) -> SearchAnswer:
    """An answer by the index, once it has been built."""
    for _ in range(100):
        with suppress(errors.Conflict):  # there is none yet
            return await client.similarity.search("q", accuracy="approximate", **options)
        await asyncio.sleep(0.1)
    raise AssertionError("no index came")


@pytest.mark.parametrize(("width", "kind"), [(8, "vector"), (2001, "halfvec"), (4001, "halfvec(4000)")])
async def test_an_index_is_built_and_gives_what_the_exact_search_gives(client, database_url, width, kind):
    await fill(client, width)
    found, exact = await approximate(client, k=5), await client.similarity.search("q", k=5, accuracy="exact")

    assert (found.pool.exact, exact.pool.exact) == (False, True)
    assert "HNSW" in found.pool.how
    assert found.hits == exact.hits
    assert (await client.similarity.search("q", k=5)).hits == exact.hits
    async with await psycopg.AsyncConnection.connect(database_url) as connection:
        rows = await (
            await connection.execute("select indexdef from pg_indexes where indexdef like '%hnsw%'")
        ).fetchall()
    assert len(rows) == 1
    assert kind in rows[0][0]


async def test_the_planner_takes_the_index(client, database_url, app):
    await fill(client, 8)
    await approximate(client)
    family = await client.initializations.get("family")
    async with await psycopg.AsyncConnection.connect(database_url) as connection:
        await connection.execute("set enable_seqscan = off")
        await connection.execute("set enable_sort = off")
        plan = await (
            await connection.execute(
                f"explain select id from versions where initialization_id = '{family.id}'"  # noqa: S608 # an id of our own
                " order by pooled::vector(8) <#> '[1,1,1,1,1,1,1,1]' limit 5"
            )
        ).fetchall()

    assert indexes.name_of(family.id) in str(plan)


async def test_the_index_knows_what_came_after_it_and_gives_nothing_that_was_deleted(client):
    vectors = await fill(client, 8)
    await approximate(client)
    await client.vectors.register("new", vector=10 * vectors[:5].sum(axis=0), initialization="family")
    first = (await approximate(client)).hits[0].reference
    await client.vectors.delete("new")
    references = [hit.reference for hit in (await approximate(client, k=COUNT)).hits]

    assert first == "default/new:1"
    assert len(references) == COUNT
    assert "default/new:1" not in references


async def test_a_filter_holds_with_an_index_too(client):
    await fill(client, 8)
    await approximate(client)
    found = await approximate(client, names=["v07", "v21"])

    assert {hit.reference for hit in found.hits} == {"default/v07:1", "default/v21:1"}


async def test_an_index_is_for_the_metric_dot_and_whole_families(client):
    await fill(client, 8)
    with pytest.raises(errors.Invalid, match="dot alone"):
        await client.similarity.search("q", metric="cosine", accuracy="approximate")
    with pytest.raises(errors.Conflict, match="not of named candidates"):
        await client.similarity.search("q", candidates=["v01"], accuracy="approximate")


async def test_what_a_crash_left_half_built_is_built_anew(client, database_url):
    await fill(client, 8)
    family = await client.initializations.get("family")
    name = indexes.name_of(family.id)
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        await connection.execute(f"create index {name} on versions using hnsw ((pooled::vector(8)) vector_ip_ops)")
        await connection.execute("update pg_index set indisvalid = false where indexrelid = %s::regclass", [name])

    assert (await approximate(client, k=3)).hits == (await client.similarity.search("q", k=3, accuracy="exact")).hits


async def test_migrations_leave_the_indexes_alone(client, database_url):
    from alembic import command

    await fill(client, 8)
    await approximate(client)
    url = database_url.replace("postgresql://", "postgresql+psycopg://")
    await asyncio.to_thread(command.check, migrate.config(url))


async def test_a_service_that_stops_leaves_off_building(client, database_url, settings):
    await fill(client, 8)
    engine, reading = create_engine(settings), create_reading_engine(settings)
    sessions, readers = create_sessionmaker(engine), create_sessionmaker(reading)
    async with (
        await psycopg.AsyncConnection.connect(database_url) as writer,
        await psycopg.AsyncConnection.connect(database_url, autocommit=True) as watching,
    ):
        await writer.execute("lock table versions in row exclusive mode")  # whose end the building waits for
        async with asyncio.timeout(20):
            async with indexes.Indexes(settings, sessions, readers).opened() as opened, readers() as session:
                assert not await opened.ready(session, await resolve_initialization(session, "family"), COUNT)
                await _seen(watching, building=True)
            await _seen(watching, building=False)
    await engine.dispose()
    await reading.dispose()


async def _seen(connection: psycopg.AsyncConnection, *, building: bool) -> None:
    """Waits until an index is being built, or none."""
    progress = "select from pg_stat_progress_create_index where datname = current_database()"
    while (await (await connection.execute(progress)).fetchone() is not None) != building:  # noqa: ASYNC110 # the database knows
        await asyncio.sleep(0.02)
