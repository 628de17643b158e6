"""How many families a process has copies of, and for how long."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest
from sqlalchemy import text

import tpv
from tpv import errors
from tpv_service.db import create_reading_engine, create_sessionmaker
from tpv_service.registry.queries import resolve_initialization
from tpv_service.search import families
from tpv_service.search.family import Family

pytestmark = pytest.mark.anyio


@pytest.fixture
async def two(client: tpv.AsyncClient) -> list[UUID]:
    """The families `one` and `other`, of a query and three vectors each."""
    made = []
    for value, name in enumerate(("one", "other")):
        start = np.full((2, 4), value, np.float32)
        made.append(await client.initializations.create(name, base_model="tiny-t5", unpinned=True, tensor=start))
        await client.vectors.register_many(
            [{"name": f"{name}-{i}"} for i in range(4)],
            vectors=np.arange(1, 33, dtype=np.float32).reshape(4, 2, 4),
            initialization=name,
        )
    return [initialization.id for initialization in made]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[UUID]:
    """The families in the order in which copies of them are opened."""
    opened = []

    class Opened(Family):
        def __init__(self, path: Path, width: int, source: str) -> None:
            opened.append(UUID(path.name))
            super().__init__(path, width, source)

    monkeypatch.setattr(families, "Family", Opened)
    return opened


async def found(client: tpv.AsyncClient, name: str) -> list[str]:
    return [hit.reference for hit in (await client.similarity.search(f"{name}-0", k=10)).hits]


async def test_the_family_not_asked_for_longest_is_closed_and_read_again_when_it_is_asked_for(
    client, two, opened, monkeypatch
):
    monkeypatch.setattr(families, "_ROWS_HELD", 6)
    one, other = two
    before = await found(client, "one")
    await found(client, "other")
    await found(client, "other")
    assert opened == [one, other]
    await client.vectors.register("new", vector=np.full((2, 4), 100, np.float32), initialization="one")
    await client.vectors.delete("one-2")

    assert before == ["default/one-3:1", "default/one-2:1", "default/one-1:1"]
    assert await found(client, "one") == ["default/new:1", "default/one-3:1", "default/one-1:1"]
    assert opened == [one, other, one]


async def test_so_are_all_but_so_many_small_ones(client, two, opened, monkeypatch):
    monkeypatch.setattr(families, "_FAMILIES_HELD", 1)
    for name in ("one", "one", "other", "one"):
        await found(client, name)

    assert opened == [two[0], two[1], two[0]]


async def test_a_copy_outlives_a_database_that_does_not_answer(client, two, opened, monkeypatch):
    before = await found(client, "one")
    look = families._LOOK
    monkeypatch.setattr(families, "_LOOK", text("select pg_terminate_backend(pg_backend_pid())"))
    with pytest.raises(errors.Unavailable):
        await found(client, "one")
    monkeypatch.setattr(families, "_LOOK", look)

    assert await found(client, "one") == before
    assert opened == [two[0]]


async def test_a_family_is_not_closed_while_another_query_is_at_it(app, settings, two, opened, monkeypatch):
    """Opened again meanwhile, two copies would write the same files."""
    turns = asyncio.Semaphore(0)
    catch_up = families._catch_up

    async def in_turn(session: Any, initialization: UUID, family: Family) -> bool:
        if initialization == two[0]:
            await turns.acquire()
        return await catch_up(session, initialization, family)

    monkeypatch.setattr(families, "_ROWS_HELD", 0)
    monkeypatch.setattr(families, "_catch_up", in_turn)
    engine = create_reading_engine(settings)
    async with create_sessionmaker(engine)() as session:
        one, other = [await resolve_initialization(session, name) for name in ("one", "other")]
    await engine.dispose()
    current = app.state["families"].current
    async with asyncio.timeout(20), asyncio.TaskGroup() as queries:
        first, second = [queries.create_task(current(one)) for _ in range(2)]
        await asyncio.sleep(0)  # both are begun
        await current(other)
        turns.release()
        await first
        third = queries.create_task(current(one))
        turns.release()
        turns.release()

    assert [len(query.result()) for query in (first, second, third)] == [4, 4, 4]
    assert sorted(opened) == sorted(two)
