"""Which token may do what with jobs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime

import httpx
import pytest
from fastapi import FastAPI
from pydantic import SecretStr
from tests.service.jobs.conftest import START, Worker, there, tune, tuned

import tpv
from tpv.errors import Conflict, Forbidden, NotFound, StaleAttempt
from tpv.schemas.jobs import EventReport
from tpv_service.auth import tokens
from tpv_service.db import create_engine, create_sessionmaker
from tpv_service.settings import Settings

pytestmark = pytest.mark.anyio

ANYBODY, WRITERS, WORKERS = {"read", "write", "worker"}, {"write"}, {"worker"}
FIRST = "first-token-of-all"
JOB = "/api/v1/jobs/01980000-0000-7000-8000-000000000000"  # there is none


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"authentication": True, "initial_token": SecretStr(FIRST)})


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[tpv.AsyncClient]:
    """The published client, with a token for everything."""
    async with tpv.AsyncClient("http://localhost", FIRST, transport=httpx.ASGITransport(app)) as client:
        yield client


@pytest.mark.parametrize(
    ("method", "url", "allowed"),
    [
        ("GET", "/api/v1/jobs", ANYBODY),
        ("GET", JOB, ANYBODY),
        ("GET", f"{JOB}/events", ANYBODY),
        ("GET", f"{JOB}/artifact", ANYBODY),
        ("GET", f"{JOB}/logs", ANYBODY),
        ("GET", f"{JOB}/attempts/1/staged/sha256:0", WORKERS),
        ("POST", "/api/v1/jobs", WRITERS),
        ("POST", f"{JOB}/cancel", WRITERS),
        ("POST", f"{JOB}/retry", WRITERS),
        ("POST", f"{JOB}/attempts", WORKERS),
        ("POST", f"{JOB}/attempts/1/events", WORKERS),
        ("POST", f"{JOB}/attempts/1/staged", WORKERS),
        ("GET", "/api/v1/workers", ANYBODY),
        ("POST", "/api/v1/workers", WORKERS),
        ("PUT", f"{JOB}/attempts/1/checkpoint?step=1", WORKERS),
        ("GET", f"{JOB}/attempts/1/checkpoints/sha256:0", WORKERS),
        ("POST", f"{JOB}/attempts/1/result", WORKERS),
        ("POST", f"{JOB}/attempts/1/failure", WORKERS),
    ],
)
async def test_a_token_may_do_what_its_scope_says(
    http: httpx.AsyncClient, settings: Settings, method: str, url: str, allowed: set[str]
):
    engine = create_engine(settings)
    answered = set()
    for scope in ANYBODY:
        async with create_sessionmaker(engine).begin() as session:
            token = await tokens.create_token(session, name=scope, scopes=[scope], created_by="test")  # type: ignore[list-item]
        answer = await http.request(method, url, headers={"Authorization": f"Bearer {token}"})
        assert answer.status_code in (200, 403, 404, 422)
        if answer.status_code != 403:
            answered.add(scope)
    await engine.dispose()

    assert answered == allowed


async def test_a_worker_speaks_for_attempts_that_it_has_begun_alone(
    app: FastAPI, settings: Settings, registry: tpv.AsyncClient
):
    job = await tune(registry)
    engine = create_engine(settings)
    clients = []
    for name in ("one", "other"):
        async with create_sessionmaker(engine).begin() as session:
            token = await tokens.create_token(session, name=name, scopes=["worker"], created_by="test")
        clients.append(tpv.AsyncClient("http://localhost", token, transport=httpx.ASGITransport(app)))
    await engine.dispose()
    one, other = clients
    theirs = await Worker.takes(one, job)
    saved = await one.jobs.save_checkpoint(theirs.job, theirs.number, 1, b"state")
    staged = await theirs.stages(tuned(2))
    foreign = Worker(other, theirs.job, theirs.number)

    with pytest.raises(StaleAttempt, match="begun with another token"):
        await Worker.takes(other, job)
    for report in (
        foreign.reads(saved),
        other.jobs.staged(theirs.job, theirs.number, staged),
        foreign.tells(EventReport(type="log", at=datetime.now(UTC), data={"message": "mine"})),
        foreign.stages(tuned(1)),
        foreign.client.jobs.save_checkpoint(theirs.job, theirs.number, 1, b"state"),
        foreign.fails(),
    ):
        with pytest.raises(Forbidden, match="begun with another token"):
            await report
    with pytest.raises(NotFound, match="has no attempt"):
        await other.jobs.checkpoint(theirs.job, theirs.number + 1, saved.digest)
    assert (await theirs.succeeds(START + tuned(1))).state == "succeeded"
    await there(one, "gpu-1")
    with pytest.raises(Conflict, match="another name"):
        await there(other, "gpu-1")
    await there(one, "gpu-1", state="gone")
    await there(other, "gpu-1")
    for client in clients:
        await client.aclose()
