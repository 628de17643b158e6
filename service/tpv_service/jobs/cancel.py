"""How a job is called off."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from tpv.errors import JobFinished
from tpv_service.jobs import queries
from tpv_service.jobs.lifecycle import end_attempt, finish, has_ended
from tpv_service.jobs.tables import JobRow
from tpv_service.queue import Queue


async def cancel_job(session: AsyncSession, queue: Queue, job_id: UUID, actor: str) -> JobRow:
    """Ends the job at once; its worker is told to stop, and what it still reports is refused.

    With it go the jobs that were submitted for it and that no other one needs, also when one of these has failed it.
    """
    prepared = await queries.lock_prepared(session, job_id)
    job = await queries.lock_job(session, job_id)
    ended = has_ended(job)
    if not ended:
        await _cancel(session, queue, job, f"cancelled by {actor}")
    alone = [needed for needed in prepared if not await queries.is_needed(session, needed.id)]
    if ended and not alone and job.state != "cancelled":
        raise JobFinished(f"job {job_id} is {job.state} already; only a queued or running job can be cancelled")
    for needed in alone:
        await _cancel(session, queue, needed, f"cancelled with job {job_id}, which alone needed it")
    return await queries.job_by_id(session, job_id)


async def _cancel(session: AsyncSession, queue: Queue, job: JobRow, message: str) -> None:
    if job.queue_id is not None:
        await queue.cancel(session, job.queue_id)
    await end_attempt(session, job, "superseded", "cancelled", message)
    await finish(session, queue, job, "cancelled", "cancelled", message)
    await session.flush()
