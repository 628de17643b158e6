"""What a search sees of registrations and deletions: all that is committed, in whatever order."""

from __future__ import annotations

import asyncio
from pathlib import Path
from uuid import UUID, uuid4

import httpx
import numpy as np
import psycopg
import pytest
from sqlalchemy import text

import tpv
from tpv import errors
from tpv_service import migrate
from tpv_service.app import create_app
from tpv_service.db import create_reading_engine, create_sessionmaker
from tpv_service.search import families
from tpv_service.search.family import Family
from tpv_service.search.queries import named
from tpv_service.settings import Settings

pytestmark = pytest.mark.anyio

_COPY = """
    with vector as (
        insert into vectors (id, namespace, name, tasks, tags, last_version, actor)
        values (gen_random_uuid(), 'default', %(name)s, '{}', '{}', 1, 'test') returning id
    )
    insert into versions (id, vector_id, number, initialization_id, fingerprint, prompt_fingerprint,
                          reconstruction_error, digest, size, norm, pooled, hyperparameters, provenance, actor)
    select gen_random_uuid(), vector.id, 1, initialization_id, fingerprint, prompt_fingerprint,
           reconstruction_error, digest, size, norm, pooled, hyperparameters, provenance, versions.actor
    from versions, vector where versions.id = %(like)s
"""


@pytest.fixture
async def family(client: tpv.AsyncClient) -> None:
    await client.initializations.create(
        "family", base_model="tiny-t5", unpinned=True, tensor=np.zeros((2, 4), np.float32)
    )
    await client.vectors.register("query", vector=np.ones((2, 4), np.float32), initialization="family")


async def found(client: tpv.AsyncClient) -> list[str]:
    answer = await client.similarity.search("query", k=100)
    assert answer.pool.size == len(answer.hits)
    return sorted(hit.reference for hit in answer.hits)


async def register(client: tpv.AsyncClient, name: str, value: float = 1.0) -> UUID:
    version = await client.vectors.register(name, vector=np.full((2, 4), value, np.float32), initialization="family")
    return version.id


async def test_what_a_restored_dump_does_not_have_is_not_found(client, family, database_url):
    await register(client, "a")
    await register(client, "b")
    assert await found(client) == ["default/a:1", "default/b:1"]
    with psycopg.connect(database_url) as connection:  # the tables are filled anew, from before `b`
        connection.execute("create temporary table dump on commit drop as select * from versions")
        connection.execute("delete from dump where vector_id = (select id from vectors where name = 'b')")
        connection.execute("truncate versions cascade")
        connection.execute("insert into versions select * from dump")

    assert await found(client) == ["default/a:1"]


async def test_rows_of_an_older_cluster_are_not_new_for_ever(client, family, database_url):
    await register(client, "a")
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("update versions set txid = '9000000000'")  # as a dump of a busier server brings them
        migrate.upgrade(database_url.replace("postgresql://", "postgresql+psycopg://"))
        (new,) = connection.execute(
            "select count(*) from versions where txid >= pg_snapshot_xmax(pg_current_snapshot())"
        ).fetchone()

    assert new == 0
    assert await found(client) == ["default/a:1"]


async def test_a_transaction_that_commits_late_is_not_missed(client, family, database_url):
    like = await register(client, "a")
    async with await psycopg.AsyncConnection.connect(database_url) as late:
        await late.execute(_COPY, {"name": "late", "like": like})  # has its number, but is not committed
        await register(client, "b")
        assert await found(client) == ["default/a:1", "default/b:1"]
        await register(client, "c")
        assert await found(client) == ["default/a:1", "default/b:1", "default/c:1"]
        await late.commit()

    assert await found(client) == ["default/a:1", "default/b:1", "default/c:1", "default/late:1"]
    assert len(await found(client)) == 4


async def test_a_transaction_that_is_rolled_back_is_never_seen(client, family, database_url):
    like = await register(client, "a")
    async with await psycopg.AsyncConnection.connect(database_url) as late:
        await late.execute(_COPY, {"name": "never", "like": like})
        await found(client)
        await late.rollback()

    assert await found(client) == ["default/a:1"]


async def test_deletions_and_restorations_are_seen_at_once(client, family):
    await register(client, "a", 1)
    await register(client, "a", 2)
    await register(client, "b")
    assert await found(client) == ["default/a:2", "default/b:1"]
    await client.vectors.delete("a:2")
    assert await found(client) == ["default/a:1", "default/b:1"]
    await client.vectors.delete("b")
    assert await found(client) == ["default/a:1"]
    await client.vectors.restore("b")
    await client.vectors.restore("a:2")
    assert await found(client) == ["default/a:2", "default/b:1"]


@pytest.mark.parametrize("broken", ["_TASKS", "_STATES"])
async def test_a_deletion_is_seen_after_a_look_that_broke_off(client, family, app, monkeypatch, broken):
    await register(client, "a")
    assert await found(client) == ["default/a:1"]
    await client.vectors.register("b", vector=np.ones((2, 4), np.float32), initialization="family", task="new")
    await client.vectors.delete("a")

    with monkeypatch.context() as patched:
        patched.setattr(families, broken, text("select pg_terminate_backend(pg_backend_pid())"))
        with pytest.raises(errors.Unavailable):
            await found(client)

    assert await found(client) == ["default/b:1"]
    assert next(iter(app.state["families"]._open.values())).family.reached  # a restart does not begin all over


async def test_a_restarted_service_goes_on_with_its_copy_and_knows_what_was_deleted(settings: Settings, tmp_path: Path):
    settings.cache_directory = tmp_path / "cache"
    async with _running(settings) as client:
        await client.initializations.create(
            "family", base_model="tiny-t5", unpinned=True, tensor=np.zeros((2, 4), np.float32)
        )
        for name in ("query", "a", "b", "c"):
            await register(client, name)
        assert len(await found(client)) == 3
    kept = sorted((tmp_path / "cache" / "0").glob("*.f32"))
    size = kept[0].stat().st_size
    settings.cache_directory = None
    async with _running(settings) as client:
        await client.vectors.delete("b")
        await register(client, "d")
    settings.cache_directory = tmp_path / "cache"
    async with _running(settings) as client:
        assert await found(client) == ["default/a:1", "default/c:1", "default/d:1"]

    assert kept[0].stat().st_size == size + 4 * 4  # the one row that is new


class _running:  # noqa: N801 # reads as a function
    """A client to an application of these settings, and what a server does around it."""

    def __init__(self, settings: Settings) -> None:
        self.app = create_app(settings)

    async def __aenter__(self) -> tpv.AsyncClient:
        self.lifespan = self.app.router.lifespan_context(self.app)
        state = await self.lifespan.__aenter__()

        async def with_state(scope, receive, send) -> None:  # type: ignore[no-untyped-def]
            scope["state"] = dict(state)
            await self.app(scope, receive, send)

        transport = httpx.ASGITransport(with_state, raise_app_exceptions=False)  # type: ignore[arg-type]
        self.client = tpv.AsyncClient("http://localhost", transport=transport)
        return self.client

    async def __aexit__(self, *error: object) -> None:
        await self.client.aclose()
        await self.lifespan.__aexit__(None, None, None)


async def test_two_services_each_have_a_copy_of_their_own(settings: Settings, tmp_path: Path):
    settings.cache_directory = tmp_path / "cache"
    async with _running(settings) as one, _running(settings) as other:
        await one.initializations.create(
            "family", base_model="tiny-t5", unpinned=True, tensor=np.zeros((2, 4), np.float32)
        )
        await register(one, "query")
        await register(other, "a")
        assert await found(one) == await found(other) == ["default/a:1"]

    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["0", "1"]


async def test_a_copy_that_could_not_be_written_is_read_anew(client, family, monkeypatch):
    await register(client, "a")
    await found(client)
    append = Family.append

    def torn(self: Family, *rest: object) -> None:
        with self._matrix.open("ab") as file:
            file.write(b"torn")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Family, "append", torn)
    await register(client, "b", 3.0)
    with pytest.raises(errors.Unavailable, match="No space left"):
        await found(client)
    monkeypatch.setattr(Family, "append", append)
    answer = await client.similarity.search("query", k=10)

    assert {hit.reference: hit.similarity for hit in answer.hits} == {"default/a:1": 4.0, "default/b:1": 12.0}


async def test_a_family_that_takes_long_is_read_on_behind_the_query(client, family, monkeypatch):
    await register(client, "a")
    go_on = asyncio.Event()
    read = families._read_rows

    async def slow(*given: object) -> None:
        await go_on.wait()
        await read(*given)

    monkeypatch.setattr(families, "_read_rows", slow)
    monkeypatch.setattr(families, "_PATIENCE", 0.01)
    with pytest.raises(errors.Unavailable, match="being read, 0 so far"):
        await found(client)
    go_on.set()
    monkeypatch.setattr(families, "_PATIENCE", 60)

    assert await found(client) == ["default/a:1"]


async def test_a_copy_of_a_future_that_the_database_does_not_know_is_read_anew(client, family, app):
    await register(client, "a")
    await found(client)
    copies = app.state["families"]._open
    next(iter(copies.values())).family.horizon = 2**60  # as before a backup was restored

    assert await found(client) == ["default/a:1"]


async def test_a_change_of_words_leaves_a_snapshot_as_it_is(client, family, app):
    await register(client, "a")
    await found(client)
    copy = next(iter(app.state["families"]._open.values())).family
    before = copy.snapshot
    await client.vectors.update("a", description="text")
    await found(client)

    assert copy.snapshot is before


async def test_any_number_of_versions_can_be_named(settings: Settings):
    engine = create_reading_engine(settings)
    async with create_sessionmaker(engine)() as session:
        assert await named(session, [uuid4().bytes for _ in range(70_000)]) == {}  # 65,535 parameters are the most
    await engine.dispose()
