"""Jobs of lost workers go back into the queue: the service looks, because nobody else may be there to do it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import timedelta

import structlog
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from tpv_service.jobs import queries
from tpv_service.jobs.lifecycle import end_attempt, enqueue, has_ended
from tpv_service.queue import Lost, Queue
from tpv_service.settings import Settings

log = structlog.get_logger()

_MESSAGE = "the worker is gone; the job waits for another one"


@asynccontextmanager
async def watch_stalled_jobs(
    settings: Settings, sessions: async_sessionmaker[AsyncSession], queue: Queue
) -> AsyncIterator[None]:
    """Looks for jobs of lost workers as long as the context is open."""
    async with queue.opened():
        watching = asyncio.create_task(_watch(settings, sessions, queue))
        try:
            yield
        finally:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching


async def _watch(settings: Settings, sessions: async_sessionmaker[AsyncSession], queue: Queue) -> None:
    pause = settings.stalled_check
    while True:
        # The first look comes after a pause too: workers outlive a restart of the service and of the database, and may
        # have had no chance to send a heartbeat meanwhile.
        await asyncio.sleep(pause.total_seconds())
        try:
            await requeue_lost_jobs(sessions, queue, settings.stalled_after)
            pause = settings.stalled_check
        except Exception as error:  # whatever it was, the next look may succeed
            log.warning("cannot look for jobs of lost workers", error=repr(error))
            pause = max(settings.stalled_check, settings.stalled_after)


async def requeue_lost_jobs(sessions: async_sessionmaker[AsyncSession], queue: Queue, silence: timedelta) -> None:
    """Gives each job that nobody works on a new entry in the queue. What a crash leaves undone, the next call does."""
    async with sessions() as session:
        lost = await queue.lost(session, silence)
    for entry in lost:
        if entry.held:
            await queue.end(entry.queue_id)
        async with sessions.begin() as session:
            await _requeue(session, queue, entry)


async def _requeue(session: AsyncSession, queue: Queue, lost: Lost) -> None:
    job = await queries.lock_job(session, lost.job)
    if has_ended(job) or job.queue_id != lost.queue_id:
        return  # its worker was not lost after all, or somebody else has done this already
    await end_attempt(session, job, "superseded", "worker-lost", _MESSAGE)
    await enqueue(session, queue, job, "worker-lost", _MESSAGE)
    log.warning("requeued the job of a lost worker", job=str(job.id), attempt=job.attempt)
