"""Which token may do what with jobs."""

from __future__ import annotations

import httpx
import pytest
from pydantic import SecretStr

from tpv_service.auth import tokens
from tpv_service.db import create_engine, create_sessionmaker
from tpv_service.settings import Settings

pytestmark = pytest.mark.anyio

ANYBODY, WRITERS, WORKERS = {"read", "write", "worker"}, {"write"}, {"worker"}
JOB = "/api/v1/jobs/01980000-0000-7000-8000-000000000000"  # there is none


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"authentication": True, "initial_token": SecretStr("first-token-of-all")})


@pytest.mark.parametrize(
    ("method", "url", "allowed"),
    [
        ("GET", "/api/v1/jobs", ANYBODY),
        ("GET", JOB, ANYBODY),
        ("GET", f"{JOB}/events", ANYBODY),
        ("GET", f"{JOB}/artifact", ANYBODY),
        ("GET", f"{JOB}/logs", ANYBODY),
        ("GET", f"{JOB}/attempts/1/staged/sha256:0", ANYBODY),
        ("POST", "/api/v1/jobs", WRITERS),
        ("POST", f"{JOB}/cancel", WRITERS),
        ("POST", f"{JOB}/retry", WRITERS),
        ("POST", f"{JOB}/attempts", WORKERS),
        ("POST", f"{JOB}/attempts/1/events", WORKERS),
        ("POST", f"{JOB}/attempts/1/staged", WORKERS),
        ("GET", "/api/v1/workers", ANYBODY),
        ("POST", "/api/v1/workers", WORKERS),
        ("PUT", f"{JOB}/attempts/1/checkpoint?step=1", WORKERS),
        ("GET", f"{JOB}/checkpoints/sha256:0", WORKERS),
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
