"""Jobs of lost workers, and of attempts that hang, go back into the queue: the service looks.

Nobody else may be there to do it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from uuid import UUID

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

_GONE = "the worker is gone; the job waits for another one"
_ENDED = "the attempt has ended and could not say how; see the log of its worker"
_NOT_STARTED = "a worker has taken the job and has not started it; see its log"


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
            silent = await queries.silent_jobs(session, self._silent_since())
        for lost in found:
            if not lost.held or lost in seen:
                async with self._transaction(lost.job) as session:
                    await _requeue(session, self.queue, lost)
        for job in silent:
            async with self._transaction(job) as session:
                await _end_silent(session, self.queue, job, self._silent_since())
        self._seen = frozenset(found)

    def _silent_since(self) -> datetime:
        return datetime.now(UTC) - self.queue.settings.silent_after

    @asynccontextmanager
    async def _transaction(self, job: UUID) -> AsyncIterator[AsyncSession]:
        """What goes wrong with this job keeps nobody from looking after the others."""
        try:
            async with self.sessions.begin() as session:
                yield session
        except Exception as error:  # of any sort: the next look tries it again
            log.warning("cannot give a job back", job=str(job), error=repr(error))


async def _requeue(session: AsyncSession, queue: Queue, lost: Lost) -> None:
    job = await queries.lock_job(session, lost.job)
    if has_ended(job) or job.queue_id != lost.queue_id:
        return  # its worker was not lost after all, or somebody else has done this already
    began = job.state == "running"
    message = _GONE if lost.held else _ENDED if began else _NOT_STARTED
    await queue.end(session, lost.queue_id)
    await end_attempt(session, job, "superseded", "worker-lost", message)
    await give_back(session, queue, job, "worker-lost", message)
    log.warning("the worker of a job is lost", job=str(job.id), attempt=job.attempt, now=job.state)


async def _end_silent(session: AsyncSession, queue: Queue, job_id: UUID, since: datetime) -> None:
    """Its worker is there and is told to end the process, which may hang in a driver or a file system."""
    job = await queries.lock_job(session, job_id)
    if job.state != "running" or job.queue_id is None or job.reported_at is None or job.reported_at >= since:
        return
    message = f"attempt {job.attempt} has reported nothing since {job.reported_at:%Y-%m-%d %H:%M} UTC: it hangs"
    await queue.cancel(session, job.queue_id)
    await end_attempt(session, job, "superseded", "timeout", message)
    await give_back(session, queue, job, "timeout", message)
    log.warning("an attempt hangs", job=str(job.id), attempt=job.attempt, now=job.state)
