"""Jobs that may not start where they are, or now: a worker that has taken one is told so, and the job is held back.

- It asks for more memory than the worker has. It comes to the workers again a little later, or, when none of its queue
  that is there has as much, once there is one.
- Its owner has as many running jobs as TPV_JOBS_PER_OWNER allows. It comes again when one of these ends.

The check is made where an attempt starts, because only there it is known by whom, and what else runs. A job that comes
again has a new entry, behind others of its priority: what cannot start holds nobody up.
"""

from __future__ import annotations

from datetime import timedelta

from pydantic import ByteSize
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from tpv_service.jobs import queries
from tpv_service.jobs.lifecycle import lock_owner, release_held, show
from tpv_service.jobs.tables import JobRow, WorkerRow
from tpv_service.queue import Queue

AGAIN = timedelta(seconds=2)  #: until a worker may take a job that another one has too little memory for


async def hold_back(session: AsyncSession, queue: Queue, job: JobRow, worker: str) -> str | None:
    """Why this worker may not start the job now; None when it may. The entry that it came by is used up otherwise."""
    able = None
    message = await _too_little_memory(session, job, worker)
    if message is not None:
        able = await session.scalar(select(queries.has_able_worker(job)))
    else:
        message = await _too_many_jobs(session, queue, job)
    if message is None:
        return None
    job.queue_id = (
        await queue.defer(session, job.id, queue=job.queue, priority=job.priority, after=AGAIN) if able else None
    )
    if job.message != message:  # else it has been said already
        show(session, job, "queued", "waiting", message)
    return message


async def release_all_held(sessions: async_sessionmaker[AsyncSession], queue: Queue) -> None:
    """Hands what may start by now to the workers again, whatever has kept anybody from doing so before."""
    async with sessions() as session:
        owners = await queries.owners_of_held(session)
    for owner in owners:
        async with sessions.begin() as session:
            await release_held(session, queue, owner)


async def _too_little_memory(session: AsyncSession, job: JobRow, worker: str) -> str | None:
    if job.min_memory is None:
        return None
    row = await session.get(WorkerRow, worker)
    if row is not None and row.memory is not None and row.memory >= job.min_memory:
        return None
    return f"waits for a worker with {ByteSize(job.min_memory).human_readable(decimal=True)} of memory"


async def _too_many_jobs(session: AsyncSession, queue: Queue, job: JobRow) -> str | None:
    limit = queue.settings.jobs_per_owner
    if limit is None:
        return None
    await lock_owner(session, job.actor)
    if await queries.running_jobs(session, job.actor, but=job.id) < limit:
        return None
    return f"waits until {job.actor} has fewer than {limit} running jobs (TPV_JOBS_PER_OWNER)"
