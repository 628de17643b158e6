"""How a job's state changes: the same few steps for whoever changes it, always under the job's row lock.

    queued ── attempt starts ──> running ── result ──> succeeded
      ^  │                        │  │└──── failure ─> failed ──────┐
      │  │                        │  └───── cancel ──> cancelled ───┤
      ├──┼── lost, or hangs ──────┘                                 │
      │  ├── cancel ──────────────────────> cancelled ──────────────┤
      │  └── a job it needs failed ───────> failed (`dependency`) ──┤
      └───────────────────────── retry ─────────────────────────────┘

Locks are taken from a job to those that wait for it, never the other way round, so no two changes block each other.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from tpv.schemas.jobs import FINISHED, JobSpec, Reason, ResolvedVector, State
from tpv_service.jobs import queries
from tpv_service.jobs.tables import EventRow, JobRow
from tpv_service.queue import Queue
from tpv_service.registry.queries import resolve_version
from tpv_service.registry.tables import VersionRow
from tpv_service.registry.views import version_reference


async def enqueue(
    session: AsyncSession,
    queue: Queue,
    job: JobRow,
    reason: Reason | None = None,
    message: str | None = None,
    *,
    first: bool = False,
    after: timedelta = timedelta(0),
) -> None:
    """Hands the job to the workers, when the session commits; `first` before those of its priority that are not."""
    job.queue_id = await queue.defer(session, job.id, queue=job.queue, priority=job.priority, first=first, after=after)
    show(session, job, "queued", reason, message)


def wait(session: AsyncSession, job: JobRow, message: str) -> None:
    """Keeps the job out of the queue until others have succeeded."""
    job.queue_id = None
    show(session, job, "queued", "waiting", message)


async def give_back(session: AsyncSession, queue: Queue, job: JobRow, reason: Reason, message: str) -> None:
    """Tries again what came to nothing through no fault of the job: later each time, and not for ever.

    It had its turn before, so it stands before what was submitted later. Only attempts count that a worker has begun,
    and has not ended because it stops.
    """
    settings = queue.settings
    if reason != "drained" and job.state == "running":
        job.lost += 1
    if job.lost >= settings.retry_limit:
        why = f"{job.lost} attempts in a row came to nothing (TPV_RETRY_LIMIT); the last one: {message}"
        await finish(session, queue, job, "failed", reason, why)
    else:
        pause = settings.retry_pause * 2 ** (job.lost - 1) if job.lost else timedelta(0)
        await enqueue(session, queue, job, reason, message, first=True, after=pause)
        if settings.jobs_per_owner is not None:
            await session.flush()
            await release_held(session, queue, job.actor)


async def release_held(session: AsyncSession, queue: Queue, owner: str) -> None:
    """Hands jobs of the owner that were held back to the workers again, as many as may run beside those that do."""
    limit = queue.settings.jobs_per_owner
    if limit is not None:
        await lock_owner(session, owner)
        limit = max(0, limit - await queries.running_jobs(session, owner))
    for job in await queries.lock_held(session, owner, limit):
        await enqueue(session, queue, job)


async def lock_owner(session: AsyncSession, owner: str) -> None:
    """No other job of this owner starts, nor is one released, before this transaction ends.

    Whoever has this lock waits for no row's lock any more, so that nobody waits in a circle.
    """
    await session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(owner, 0))))


async def finish(
    session: AsyncSession,
    queue: Queue,
    job: JobRow,
    state: State,
    reason: Reason | None = None,
    message: str | None = None,
) -> None:
    """Ends the job, and with it those that wait for it: with its success they may start, else they fail."""
    ran = job.state == "running"
    show(session, job, state, reason, message)
    job.finished_at = datetime.now(UTC)
    if state == "succeeded":
        await queries.drop_checkpoints(session, job.id)
    await session.flush()
    for dependent in await queries.lock_dependents(session, job.id):
        if state == "succeeded":
            await _release(session, queue, dependent)
        else:
            await _fail_dependent(session, queue, dependent, job)
    if ran and queue.settings.jobs_per_owner is not None:
        await session.flush()
        await release_held(session, queue, job.actor)


async def end_attempt(
    session: AsyncSession,
    job: JobRow,
    state: Literal["succeeded", "failed", "superseded"],
    reason: Reason | None = None,
    message: str | None = None,
) -> None:
    """Closes the attempt that is running now, if one is."""
    attempt = await queries.current_attempt(session, job)
    if attempt is not None and attempt.state == "running":
        attempt.state, attempt.reason, attempt.message = state, reason, message
        attempt.finished_at = datetime.now(UTC)


def show(
    session: AsyncSession, job: JobRow, state: State, reason: Reason | None = None, message: str | None = None
) -> None:
    """Sets what a user sees, and tells those who follow the job."""
    job.state, job.reason, job.message = state, reason, message
    data: dict[str, Any] = {"state": state, "reason": reason, "message": message}
    session.add(
        EventRow(job_id=job.id, attempt=job.attempt or None, type=queries.STATE_EVENT, at=datetime.now(UTC), data=data)
    )


async def _release(session: AsyncSession, queue: Queue, job: JobRow) -> None:
    """Gives a waiting job what those that it needs have made; the last one of these puts it in the queue.

    All of them are looked at, not the one alone that has ended now: another may have ended while this job, that had
    failed before, was being brought back, and have passed it over.
    """
    needs = [need.needed for need in await queries.needs_of(session, job.id)]
    for need in needs:
        if need.state == "succeeded":
            await take_result(session, job, need)
    if lost := next((need for need in needs if need.state in queries.LOST), None):
        await _fail_dependent(session, queue, job, lost)
    elif job.queue_id is None and all(need.state == "succeeded" for need in needs):
        await enqueue(session, queue, job)


async def _fail_dependent(session: AsyncSession, queue: Queue, job: JobRow, lost: JobRow) -> None:
    what = "failed" if lost.state == "failed" else f"was {lost.state}"
    why = f"job {lost.id}, which this one needs, {what}: {lost.message}"
    await finish(session, queue, job, "failed", "dependency", why)


async def take_result(session: AsyncSession, job: JobRow, ended: JobRow) -> None:
    """Gives a job the vector that one that it needs has made, if it waits for that; a second time changes nothing."""
    spec, made = JobSpec.model_validate(job.spec), ended.spec["output"]
    is_target = spec.target is None and spec.target_name == made
    if not is_target and made not in spec.unmade_sources:
        return
    vector = resolved_vector(await resolve_version(session, str(ended.result_version_id)))
    if is_target:
        spec.target = vector
    else:  # at the place that it was named at: those before it that are not made yet come later
        place = spec.unmade_sources.pop(made)
        spec.sources.insert(place - sum(other < place for other in spec.unmade_sources.values()), vector)
    job.spec = spec.model_dump(mode="json")


def resolved_vector(row: VersionRow) -> ResolvedVector:
    return ResolvedVector(reference=version_reference(row), version_id=row.id, fingerprint=row.fingerprint)


def has_ended(job: JobRow) -> bool:
    return job.state in FINISHED
