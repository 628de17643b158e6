"""Approximate search: an index that the service builds for a large family, here for a very small one."""

from __future__ import annotations

import asyncio
import re
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
    await register(client, vectors)
    query = (vectors[:5].sum(axis=0) + 0.1 * random.normal(size=(1, width))).astype(np.float32)
    await client.vectors.register("q", vector=query, initialization="family")
    return vectors


async def register(client: tpv.AsyncClient, vectors: np.ndarray) -> None:
    """Registers vectors (n, 1, d) as `v00`, `v01`, ... of a new initialization, `family`."""
    start = np.zeros(vectors.shape[1:], np.float32)
    await client.initializations.create("family", base_model="tiny-t5", unpinned=True, tensor=start)
    await client.vectors.register_many(
        [{"name": f"v{i:02}"} for i in range(len(vectors))], vectors=vectors, initialization="family"
    )


async def approximate(client: tpv.AsyncClient, query: str = "q", **options: object) -> SearchAnswer:
    """An answer by the index, once it has been built."""
    for _ in range(100):
        with suppress(errors.Conflict):  # there is none yet
            return await client.similarity.search(query, accuracy="approximate", **options)
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


async def test_auto_compares_all_where_that_does_not_take_long(client, monkeypatch):
    await fill(client, 8)
    await approximate(client)
    assert not (await after_the_trial(client)).pool.exact

    monkeypatch.setattr("tpv_service.search.indexes.WORTH", 8 * COUNT + 1)  # times `above`, which is 1 here
    assert (await client.similarity.search("q", k=5)).pool.exact


async def test_auto_leaves_an_index_that_misses_what_exact_search_finds(client, monkeypatch):
    await fill(client, 8)
    exact = await client.similarity.search("q", k=5, accuracy="exact")
    nearest = indexes.Indexes.nearest

    async def others_than_the_best(*asked, **options):
        return (await nearest(*asked, **options))[5:]

    monkeypatch.setattr(indexes.Indexes, "nearest", others_than_the_best)
    assert (await approximate(client, k=5)).hits != exact.hits

    found = await after_the_trial(client)
    assert found.pool.exact
    assert found.hits == exact.hits


async def test_an_index_is_tried_anew_when_the_family_has_grown_much(client):
    await fill(client, 8)
    await approximate(client, k=5)
    assert not (await after_the_trial(client)).pool.exact
    await client.vectors.register_many(
        [{"name": f"more{i:02}"} for i in range(COUNT)],
        vectors=np.full((COUNT, 1, 8), -1, np.float32),
        initialization="family",
    )

    assert (await client.similarity.search("q", k=5)).pool.exact
    assert not (await after_the_trial(client)).pool.exact


async def test_an_index_that_somebody_drops_is_made_again(client, database_url):
    await fill(client, 8)
    found = await approximate(client, k=5)
    assert not (await after_the_trial(client)).pool.exact
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        (name,) = await (
            await connection.execute("select indexname from pg_indexes where indexdef like '%hnsw%'")
        ).fetchone()
        await connection.execute(f"drop index {name}")

    exact = await client.similarity.search("q", k=5, accuracy="approximate")
    assert (exact.pool.exact, exact.hits) == (True, found.hits)
    with pytest.raises(errors.Conflict, match="there is no index"):
        await client.similarity.search("q", k=5, accuracy="approximate")
    assert (await approximate(client, k=5)).hits == found.hits
    assert (await client.similarity.search("q", k=5)).pool.exact  # it is tried anew


async def test_an_index_made_again_by_somebody_else_is_tried_anew(client, database_url):
    await fill(client, 8)
    await approximate(client)
    assert not (await after_the_trial(client)).pool.exact
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        name, definition = await (
            await connection.execute("select indexname, indexdef from pg_indexes where indexdef like '%hnsw%'")
        ).fetchone()
        await connection.execute(f"drop index {name}")
        await connection.execute(definition)

    assert (await client.similarity.search("q", k=5)).pool.exact
    assert not (await after_the_trial(client)).pool.exact


async def test_an_index_that_cannot_be_built_is_not_tried_again_at_once(client, monkeypatch):
    builds = []

    async def fail(self, session, initialization):
        builds.append(initialization.id)
        raise OSError("No space left on device")

    monkeypatch.setattr(indexes.Indexes, "_build_now", fail)
    await fill(client, 8)
    for _ in range(5):
        with pytest.raises(errors.Conflict, match="there is no index"):
            await client.similarity.search("q", accuracy="approximate")
        await asyncio.sleep(0.1)

    assert len(builds) == 1


async def test_an_index_that_another_process_is_making_again_is_not_asked(client, database_url):
    await fill(client, 8)
    found = await approximate(client, k=5)
    name = indexes.name_of((await client.initializations.get("family")).id)
    valid = "update pg_index set indisvalid = %s where indexrelid = %s::regclass"

    async def oid(connection: psycopg.AsyncConnection) -> int:
        return (await (await connection.execute("select %s::regclass::oid", [name])).fetchone())[0]

    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        await connection.execute("select pg_advisory_lock(%s)", [indexes.LOCK])
        before = await oid(connection)
        await connection.execute(valid, [False, name])
        assert (await client.similarity.search("q", k=5, accuracy="approximate")).pool.exact
        for _ in range(3):
            with pytest.raises(errors.Conflict, match="there is no index"):
                await client.similarity.search("q", k=5, accuracy="approximate")
            await asyncio.sleep(0.1)

        assert await oid(connection) == before  # this service has not made it, too
        await connection.execute(valid, [True, name])
        answer = await client.similarity.search("q", k=5, accuracy="approximate")
    assert (answer.pool.exact, answer.hits) == (False, found.hits)


async def after_the_trial(client: tpv.AsyncClient) -> SearchAnswer:
    """An answer of `auto`, when it has compared the index with exact search, whose answers it gives until then."""
    for times in range(1, indexes.TRIALS + 1):
        query = {"q": times}
        exact = await client.similarity.search(query, k=5, accuracy="exact")
        assert await client.similarity.search(query, k=5) == exact
    return await client.similarity.search("q", k=5)


async def test_one_query_asked_again_and_again_says_nothing_of_others(client):
    await fill(client, 8)
    await approximate(client)
    for _ in range(indexes.TRIALS + 1):
        assert (await client.similarity.search("q", k=5)).pool.exact
    for times in range(2, indexes.TRIALS + 2):  # nor does a search that is more or less thorough than usual
        for ef_search in (1, 1000):
            assert (await client.similarity.search({"q": times}, k=5, ef_search=ef_search)).pool.exact
    assert (await client.similarity.search("q", k=5)).pool.exact


async def test_an_index_that_gives_some_of_many_equal_ones_is_as_good_as_exact_search(client):
    vectors = np.repeat(np.eye(4, 8, dtype=np.float32), 50, axis=0)[:, np.newaxis]
    await register(client, vectors)
    await client.vectors.register("q", vector=vectors.sum(axis=0), initialization="family")
    await approximate(client)
    for times in range(1, indexes.TRIALS + 1):
        await client.similarity.search({"q": times}, k=2)

    assert not (await client.similarity.search("q", k=2)).pool.exact


@pytest.mark.parametrize("width", [2001, 4096])
async def test_of_a_wide_pool_the_part_that_the_index_gives_has_the_best(client, width):
    """Fifty clusters of eight vectors, queries of each; 4096, as wide as Llama-3-8B, is more than an index takes."""
    random = np.random.default_rng(width)
    matrix = np.repeat(0.5 * random.normal(size=(50, width)), 8, axis=0) + random.normal(size=(400, width))
    # The last one is the most like the first, by numbers that are mostly beyond the first 4000 of 4096.
    matrix[-1] = matrix[0] * np.where(np.arange(width) < width - 96, 0.2, 4)
    matrix = matrix.astype(np.float32)
    await register(client, matrix[:, np.newaxis])
    products = matrix @ matrix.T
    np.fill_diagonal(products, -np.inf)
    recalls = []
    for row in range(0, 400, 8):
        found = await approximate(client, f"v{row:02}", k=10)
        (given,) = re.findall(r"gave (\d+)", found.pool.how)
        assert int(given) < found.pool.size == 399
        best = [f"default/v{other:02}:1" for other in np.argsort(-products[row])[:10]]
        recalls.append(len({*best} & {hit.reference for hit in found.hits}) / 10)
        if row == 0:
            assert found.hits[0].reference == best[0] == "default/v399:1"

    assert np.mean(recalls) >= 0.99


async def test_the_planner_takes_the_index(client, database_url):
    await fill(client, 8)
    name = indexes.name_of((await client.initializations.get("family")).id)
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as watching:
        for _ in range(100):
            await approximate(client)
            scans = "select idx_scan from pg_stat_user_indexes where indexrelname = %s"
            if (await (await watching.execute(scans, [name])).fetchone())[0]:
                return
            await asyncio.sleep(0.1)  # it is counted a second later
    raise AssertionError("the index was not scanned")


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


@pytest.mark.parametrize("width", [2001, 4096])
async def test_vectors_beyond_half_precision_are_taken_and_found_with_an_index_too(client, width):
    vectors = await fill(client, width, 150)
    await client.vectors.register("before", vector=1e6 * vectors[0], initialization="family")
    await approximate(client)  # one is built in spite of it
    await client.vectors.register("after", vector=1e7 * vectors[1], initialization="family")
    found, exact = await approximate(client, k=5), await client.similarity.search("q", k=5, accuracy="exact")

    assert not found.pool.exact
    assert [hit.reference for hit in found.hits[:2]] == ["default/after:1", "default/before:1"]
    assert found.hits == exact.hits


async def test_a_filter_holds_with_an_index_too(client):
    await fill(client, 8)
    await approximate(client)
    found = await approximate(client, names=["v07", "v21"])

    assert not found.pool.exact
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
