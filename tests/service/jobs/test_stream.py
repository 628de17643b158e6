"""Events as they come, and the log as text."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from tests.service.jobs.conftest import Worker, event, tune, tuned

from tpv import AsyncClient
from tpv.schemas.jobs import Job
from tpv_service.app import create_app
from tpv_service.server import listen, url_of
from tpv_service.settings import Settings

pytestmark = pytest.mark.anyio

STREAM = {"Accept": "text/event-stream"}


async def frames(answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The events of a stream, and what their frames say of them."""
    frame: dict[str, str] = {}
    async for line in answer.aiter_lines():
        name, _, value = line.partition(": ")
        if line:
            frame[name] = value
        elif "data" in frame:
            yield {**json.loads(frame["data"]), "frame": (int(frame["id"]), frame["event"])}
            frame = {}


async def collect(http: httpx.AsyncClient, job: Job, **headers: str) -> list[dict[str, Any]]:
    async with http.stream("GET", f"/api/v1/jobs/{job.id}/events", headers=STREAM | headers) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        return [found async for found in frames(answer)]


async def test_a_stream_has_every_event_once_and_ends_with_the_job(registry: AsyncClient, http: httpx.AsyncClient):
    job = await tune(registry)
    worker = await Worker.takes(registry, job)
    following = asyncio.create_task(collect(http, job))
    for step in range(5):
        await worker.tells(event("progress", step=step, steps=5, loss=1.0), event("log", message=f"line {step}\n2"))
    await worker.succeeds(tuned(1))
    found = await following
    page = await registry.jobs.events(job)

    assert [one["frame"] for one in found] == [(e.id, e.type) for e in page.items]
    assert [one["data"] for one in found] == [e.data for e in page.items]
    rest = await collect(http, job, **{"Last-Event-ID": str(page.items[2].id)})
    assert [one["id"] for one in rest] == [e.id for e in page.items[3:]]
    ended = await http.get(f"/api/v1/jobs/{job.id}/events", headers=STREAM | {"Last-Event-ID": str(page.items[-1].id)})
    assert ended.status_code == 204


async def test_a_stream_of_no_job_is_an_error(http: httpx.AsyncClient):
    answer = await http.get("/api/v1/jobs/01980000-0000-7000-8000-000000000000/events", headers=STREAM)
    assert (answer.status_code, answer.headers["content-type"]) == (404, "application/problem+json")


@contextmanager
def served(settings: Settings, port: int = 0) -> Iterator[str]:
    """The service on a socket; leaving breaks off what it answers then."""
    listener = listen("127.0.0.1", port)
    server = uvicorn.Server(uvicorn.Config(create_app(settings), access_log=False, timeout_graceful_shutdown=0))
    running = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    running.start()
    try:
        yield url_of(listener)
    finally:
        server.should_exit = True
        running.join()
        listener.close()


async def test_a_stream_goes_on_after_a_restart_of_the_service(registry: AsyncClient, settings: Settings):
    job = await tune(registry)
    worker = await Worker.takes(registry, job)
    seen: list[dict[str, Any]] = []
    with served(settings) as url:
        async with httpx.AsyncClient(base_url=url) as http:
            path = f"/api/v1/jobs/{job.id}/events"
            async with http.stream("GET", path, headers=STREAM) as answer:
                async for found in frames(answer):
                    seen.append(found)
                    if len(seen) == 2:
                        await worker.tells(*(event("progress", step=step, loss=1.0) for step in range(3)))
                    if len(seen) == 4:
                        break  # in the middle of what there is
    await worker.tells(event("log", message="nobody listens"))
    with served(settings, port=int(url.rsplit(":", 1)[1])) as url:
        async with httpx.AsyncClient(base_url=url) as http:
            following = asyncio.create_task(collect(http, job, **{"Last-Event-ID": str(seen[-1]["id"])}))
            await worker.succeeds(tuned(1))
            seen += await following

    assert [found["id"] for found in seen] == [e.id for e in (await registry.jobs.events(job)).items]
    assert len(seen) == 2 + 3 + 1 + 1


async def test_a_log_is_text(registry: AsyncClient):
    job = await tune(registry)
    worker = await Worker.takes(registry, job)
    await worker.tells(event("phase", message="tuning"), event("progress", step=1, loss=1.0))
    await registry.jobs.save_checkpoint(job, 1, 1, b"state")
    await worker.fails("drained", "the worker stops")
    worker = await Worker.takes(registry, job)
    await worker.tells(event("warning", message="the group flaps"))
    lines = (await registry.jobs.logs(job)).splitlines()

    assert [line.split(" ", 1)[1] for line in lines] == [
        "attempt - state: queued",
        "attempt 1 state: running",
        "attempt 1 phase: tuning",
        "attempt 1 checkpoint: after step 1, 5 bytes",
        "attempt 1 state: queued drained the worker stops",
        "attempt 2 state: running",
        "attempt 2 warning: the group flaps",
    ]
    assert (await registry.jobs.logs(job, attempt=2)).splitlines() == lines[-2:]
