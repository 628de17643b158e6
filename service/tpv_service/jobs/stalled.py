"""Jobs of lost workers go back into the queue: the service looks, because nobody else may be there to do it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from tpv_service.jobs import queries
from tpv_service.jobs.forget import forget_regularly
from tpv_service.jobs.held import release_all_held
from tpv_service.jobs.lifecycle import end_attempt, give_back, has_ended
from tpv_service.queue import Lost, Queue
from tpv_service.settings import Settings
from tpv_service.storage import BlobStore

log = structlog.get_logger()

_MESSAGE = "the worker is gone; the job waits for another one"


@asynccontextmanager
async def watch_stalled_jobs(
    settings: Settings, sessions: async_sessionmaker[AsyncSession], queue: Queue, scratch: BlobStore
) -> AsyncIterator[None]:
    """Looks for jobs of lost workers as long as the context is open, and forgets what is over."""
    async with queue.opened():
        tasks = [
            asyncio.create_task(_watch(settings, sessions, queue)),
            asyncio.create_task(forget_regularly(sessions, queue, scratch)),
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _watch(settings: Settings, sessions: async_sessionmaker[AsyncSession], queue: Queue) -> None:
    lost_jobs, pause = LostJobs(sessions, queue), settings.stalled_check
    while True:
        await asyncio.sleep(pause.total_seconds())
        try:
            await lost_jobs.look()
            await release_all_held(sessions, queue)
            pause = settings.stalled_check
        except Exception as error:  # whatever it was, the next look may succeed
            log.warning("cannot look for jobs of lost workers", error=repr(error))
            pause = max(settings.stalled_check, settings.stalled_after)


class LostJobs:
    """Jobs that nobody works on, looked for again and again.

    A silent worker is lost when two looks in a row find it silent, with the same last heartbeat. The time between them
    is one in which this process and the database were awake: a laptop that was suspended, or a database that was away,
    has kept healthy workers from their heartbeat until the first look, but not until the second. What is remembered
    between two looks is the first one's findings, in this process alone; a restart begins with none.
    """

    def __init__(self, sessions: async_sessionmaker[AsyncSession], queue: Queue) -> None:
        self.sessions, self.queue = sessions, queue
        self._seen: frozenset[Lost] = frozenset()

    async def look(self) -> None:
        """Gives each lost job back to the queue, a transaction each: what a crash leaves undone, the next look does."""
        seen, self._seen = self._seen, frozenset()  # a look that fails is none
        async with self.sessions() as session:
            found = await self.queue.lost(session)
        for lost in found:
            if not lost.held or lost in seen:
                async with self.sessions.begin() as session:
                    await _requeue(session, self.queue, lost)
        self._seen = frozenset(found)


async def _requeue(session: AsyncSession, queue: Queue, lost: Lost) -> None:
    job = await queries.lock_job(session, lost.job)
    if has_ended(job) or job.queue_id != lost.queue_id:
        return  # its worker was not lost after all, or somebody else has done this already
    await queue.end(session, lost.queue_id)
    await end_attempt(session, job, "superseded", "worker-lost", _MESSAGE)
    await give_back(session, queue, job, "worker-lost", _MESSAGE)
    log.warning("the worker of a job is lost", job=str(job.id), attempt=job.attempt, now=job.state)
