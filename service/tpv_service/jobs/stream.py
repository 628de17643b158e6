"""A job's events as they come: server-sent events, and its log as text."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from uuid import UUID

from fastapi.responses import Response, StreamingResponse
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from tpv.schemas.jobs import Event, EventPage
from tpv_service.jobs import queries

Sessions = async_sessionmaker[AsyncSession]

LOOK_EVERY = 0.15  #: seconds between two looks for new events, for those who wait for them
KEEP_ALIVE = 15.0  #: seconds; a proxy may close a connection that is silent for longer
PAGE = 1000  #: events read at once


async def event_stream(sessions: Sessions, job: UUID, after: int) -> Response:
    """The events after one of them, until the job has ended. 204, on which a browser does not ask again, if it has.

    The id of each event is its own, so that `Last-Event-ID` continues on any server of this registry.
    """
    first = await _page(sessions, job, after)
    if first.finished and not first.items:
        return Response(status_code=204)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # the latter for nginx, which collects otherwise
    return StreamingResponse(_frames(sessions, job, first), media_type="text/event-stream", headers=headers)


async def _frames(sessions: Sessions, job: UUID, page: EventPage) -> AsyncIterator[str]:
    """No database connection is held between two looks."""
    spoken = time.monotonic()
    while True:
        for event in page.items:
            yield f"id: {event.id}\nevent: {event.type}\ndata: {event.model_dump_json()}\n\n"
            spoken = time.monotonic()
        if page.finished:
            return
        if not page.items:
            if time.monotonic() - spoken > KEEP_ALIVE:
                yield ": the job goes on\n\n"
                spoken = time.monotonic()
            await asyncio.sleep(LOOK_EVERY)
        page = await _page(sessions, job, page.next_after)


async def log_lines(sessions: Sessions, job: UUID, attempt: int | None) -> AsyncIterator[str]:
    """What was said of the job so far, a line each; of one attempt, or of all."""
    after = 0
    while True:
        async with sessions() as session:
            events = await queries.log_events(session, job, after, PAGE, attempt)
        for event in events:
            yield _line(event)
        if len(events) < PAGE:
            return
        after = events[-1].id


def _line(event: Event) -> str:
    data = event.data
    said = " ".join(str(data[name]) for name in ("state", "reason", "message") if data.get(name))
    if event.type == queries.CHECKPOINT_EVENT:
        said = f"after step {data['step']}, {data['size']} bytes"
    return f"{event.at:%Y-%m-%dT%H:%M:%S.%f%z} attempt {event.attempt or '-'} {event.type}: {said}\n"


async def _page(sessions: Sessions, job: UUID, after: int) -> EventPage:
    async with sessions() as session:
        return await queries.event_page(session, job, after, PAGE)
