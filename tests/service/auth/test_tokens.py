"""Bearer tokens: named, scoped, expiring, hashed."""

from __future__ import annotations

from datetime import timedelta

import httpx
import pytest
from pydantic import SecretStr
from sqlalchemy import text

from tpv_service.auth import tokens
from tpv_service.db import create_engine, create_sessionmaker

pytestmark = pytest.mark.anyio

FIRST = "first-token-of-the-lab"


@pytest.fixture
def settings(settings):
    return settings.model_copy(update={"authentication": True, "initial_token": SecretStr(FIRST)})


@pytest.fixture
async def sessions(settings):
    engine = create_engine(settings)
    yield create_sessionmaker(engine)
    await engine.dispose()


async def ask(http: httpx.AsyncClient, token: str | None, method: str = "GET") -> int:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    url = "/api/v1/vectors" if method == "GET" else "/api/v1/vectors/default/x/restore"
    return (await http.request(method, url, headers=headers)).status_code


async def test_without_a_valid_token_nothing_is_answered(http):
    answer = await http.get("/api/v1/vectors")

    assert (answer.status_code, answer.json()["type"]) == (401, "urn:tpv:problem:unauthorized")
    assert await ask(http, "wrong") == 401
    assert (await http.get("/healthz")).status_code == 200


async def test_the_first_token_comes_from_the_environment_and_may_do_all(http):
    assert await ask(http, FIRST) == 200
    assert await ask(http, FIRST, "POST") == 404


async def test_a_token_may_do_what_its_scopes_say(http, sessions):
    async with sessions.begin() as session:
        reader = await tokens.create_token(session, name="reader", scopes=["read"], created_by="test")

    assert await ask(http, reader) == 200
    assert await ask(http, reader, "POST") == 403


async def test_an_expired_or_revoked_token_is_refused(http, sessions):
    async with sessions.begin() as session:
        expired = await tokens.create_token(
            session, name="old", scopes=["read"], created_by="test", lifetime=timedelta(seconds=-1)
        )
        revoked = await tokens.create_token(session, name="gone", scopes=["read"], created_by="test")
        await tokens.revoke_token(session, "gone")

    assert await ask(http, expired) == 401
    assert await ask(http, revoked) == 401


async def test_only_a_hash_is_stored(app, sessions):
    async with sessions() as session:
        stored = (await session.execute(text("select tokens::text from tokens"))).scalars().all()

    assert stored
    assert FIRST not in str(stored)


async def test_every_write_keeps_its_actor(http):
    answer = await http.post(
        "/api/v1/datasets/default/mr/versions",
        data={"metadata": "{}"},
        files={"train": ("t.jsonl", b'{"source": "a", "target": "b"}')},
        headers={"Authorization": f"Bearer {FIRST}"},
    )

    assert answer.json()["actor"].startswith("initial-")
