"""How a job that came to nothing is taken up again."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from tpv.errors import Conflict
from tpv_service.jobs import queries
from tpv_service.jobs.lifecycle import enqueue, take_result, wait
from tpv_service.jobs.tables import JobRow
from tpv_service.queue import Queue


async def retry_job(session: AsyncSession, queue: Queue, job_id: UUID, actor: str, *, fresh: bool) -> JobRow:
    """Puts a failed or cancelled job back; attempts go on counting, from the last checkpoint unless `fresh`.

    With it goes what was submitted for it and came to nothing too. Jobs that failed because of this one wait for it
    again, unless another job that they need has failed too.
    """
    needs = await queries.lock_needs(session, job_id)
    prepared = [need for need in needs if need.prepares and need.state in queries.LOST]
    for need in prepared:
        await retry_job(session, queue, need.id, actor, fresh=False)
    job = await queries.lock_job(session, job_id)
    brought_back = bool(prepared) and job.state == "queued"  # with these, if it had failed because of them alone
    if job.state not in queries.LOST and not brought_back:
        raise Conflict(f"job {job_id} is {job.state}; only a failed or cancelled one is retried")
    if lost := [need for need in needs if need.state in queries.LOST]:
        raise Conflict(
            "; ".join(f"job {need.id}, which this one needs, is {need.state}" for need in lost)
            + f"; retry first: tpv job retry {lost[0].id}",
            needs=[str(need.id) for need in lost],
        )
    job.lost, job.progress, job.finished_at = 0, {}, None
    if fresh:
        await queries.drop_checkpoints(session, job.id)
    if not brought_back:
        await _take_results(session, job, needs)
        if waits_for := [str(need.id) for need in needs if need.state != "succeeded"]:
            wait(session, job, f"waits for job {', '.join(waits_for)}")
        else:
            await enqueue(session, queue, job, message=f"retried by {actor}")
        await _revive_dependents(session, job)
    await session.flush()
    return await queries.job_by_id(session, job_id)


async def _take_results(session: AsyncSession, job: JobRow, needs: Sequence[JobRow]) -> None:
    """What came of them while this job had ended."""
    for need in needs:
        if need.state == "succeeded":
            await take_result(session, job, need)


async def _revive_dependents(session: AsyncSession, job: JobRow) -> None:
    await session.flush()
    for dependent in await queries.lock_dependents(session, job.id, "failed"):
        if dependent.reason == "dependency" and not await queries.waits(session, dependent.id, queries.LOST):
            dependent.finished_at = None
            await _take_results(session, dependent, [n.needed for n in await queries.needs_of(session, dependent.id)])
            wait(session, dependent, f"waits for job {job.id}, which is tried again")
            await _revive_dependents(session, dependent)
