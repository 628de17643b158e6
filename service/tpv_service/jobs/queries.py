"""Questions to the jobs' tables. Nothing here commits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any, TypeVar
from uuid import UUID

from sqlalchemy import ColumnElement, Select, and_, any_, delete, exists, func, or_, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import aliased, joinedload, selectinload

from tpv.errors import NotFound
from tpv.schemas.jobs import FINISHED, Event, EventPage, State
from tpv_service.jobs.tables import AttemptRow, CheckpointRow, EventRow, JobRow, NeedRow, StagedRow, WorkerRow
from tpv_service.registry.tables import VersionRow

T = TypeVar("T")

LIVE = ("queued", "running")
LOST = ("failed", "cancelled")  #: ended, and nothing came of it; a retry brings it back
WORKER_SILENCE = timedelta(seconds=50)  #: a worker reports every 15 s; without three reports in a row it is gone
WORKERS_KEPT = timedelta(days=7)  #: after they were last seen
STATE_EVENT = "state"
CHECKPOINT_EVENT = "checkpoint"
LOGGED = (STATE_EVENT, CHECKPOINT_EVENT, "phase", "log", "warning")
OWN_EVENTS = (STATE_EVENT, CHECKPOINT_EVENT)  #: those that the service itself writes


def full_job() -> Select[JobRow]:
    """Jobs with all that an answer shows."""
    return (
        select(JobRow)
        .options(
            selectinload(JobRow.attempts),
            selectinload(JobRow.needs).joinedload(NeedRow.needed),
            selectinload(JobRow.evaluations),
            joinedload(JobRow.result_version).joinedload(VersionRow.vector),
        )
        .execution_options(populate_existing=True)
    )


async def job_by_id(session: AsyncSession, job: UUID) -> JobRow:
    return _found(await session.scalar(full_job().where(JobRow.id == job)), job)


async def lock_job(session: AsyncSession, job: UUID) -> JobRow:
    """The job as it is now; nobody else changes it, or reports on it, before this transaction ends."""
    statement = select(JobRow).where(JobRow.id == job).with_for_update().execution_options(populate_existing=True)
    return _found(await session.scalar(statement), job)


async def lock_dependents(session: AsyncSession, job: UUID, state: State = "queued") -> Sequence[JobRow]:
    """The jobs that need this one and are in this state, locked in one order by everybody."""
    statement = (
        select(JobRow)
        .join(NeedRow, NeedRow.job_id == JobRow.id)
        .where(NeedRow.needs_id == job, JobRow.state == state)
        .order_by(JobRow.id)
        .with_for_update(of=JobRow)
        .execution_options(populate_existing=True)
    )
    return (await session.scalars(statement)).all()


async def lock_needs(session: AsyncSession, job: UUID) -> Sequence[JobRow]:
    """The jobs that this one needs, locked in one order by everybody; before the job itself is."""
    statement = (
        select(JobRow)
        .join(NeedRow, NeedRow.needs_id == JobRow.id)
        .where(NeedRow.job_id == job)
        .order_by(JobRow.id)
        .with_for_update(of=JobRow)
        .execution_options(populate_existing=True)
    )
    return (await session.scalars(statement)).all()


async def needs_of(session: AsyncSession, job: UUID) -> Sequence[NeedRow]:
    """What the job needs, as it is now."""
    statement = select(NeedRow).where(NeedRow.job_id == job).options(joinedload(NeedRow.needed))
    statement = statement.order_by(NeedRow.needs_id).execution_options(populate_existing=True)
    return (await session.scalars(statement)).all()


async def silent_jobs(session: AsyncSession, since: datetime) -> Sequence[UUID]:
    """Running jobs whose attempt has said nothing since then."""
    statement = select(JobRow.id).where(JobRow.state == "running", JobRow.reported_at < since).order_by(JobRow.id)
    return (await session.scalars(statement)).all()


async def waits(session: AsyncSession, job: UUID, states: Sequence[str] = ("queued", "running", *LOST)) -> bool:
    """Whether a job that this one needs is in one of the states: those in which it has not succeeded."""
    unmet = (
        select(NeedRow.job_id)
        .join(JobRow, JobRow.id == NeedRow.needs_id)
        .where(NeedRow.job_id == job, JobRow.state.in_(states))
    )
    return bool(await session.scalar(select(exists(unmet))))


async def running_jobs(session: AsyncSession, owner: str, *, but: UUID | None = None) -> int:
    """How many jobs of this owner run, one aside."""
    statement = select(func.count()).select_from(JobRow).where(JobRow.state == "running", JobRow.actor == owner)
    return await session.scalar(statement if but is None else statement.where(JobRow.id != but)) or 0


async def owners_of_held(session: AsyncSession) -> Sequence[str]:
    return (await session.scalars(select(JobRow.actor).where(_held()).distinct().order_by(JobRow.actor))).all()


async def lock_held(session: AsyncSession, owner: str, limit: int | None) -> Sequence[JobRow]:
    """The first jobs of this owner that were held back and may be handed out; those that others change are left out."""
    statement = (
        select(JobRow)
        .where(_held(), JobRow.actor == owner)
        .order_by(JobRow.priority.desc(), JobRow.id)
        .limit(limit)
        .with_for_update(of=JobRow, skip_locked=True)
        .execution_options(populate_existing=True)
    )
    return (await session.scalars(statement)).all()


def _held() -> ColumnElement[bool]:
    """Waiting outside the queue, though for no other job, nor for a worker that is not there."""
    needed = aliased(JobRow)
    unmet = exists().where(NeedRow.job_id == JobRow.id, needed.id == NeedRow.needs_id, needed.state != "succeeded")
    fits = or_(JobRow.min_memory.is_(None), has_able_worker(JobRow))
    return and_(JobRow.state == "queued", JobRow.queue_id.is_(None), ~unmet, fits)


def has_able_worker(job: JobRow | type[JobRow]) -> ColumnElement[bool]:
    """Whether a worker that takes from the job's queue is there, as far as is known, with the memory it asks for."""
    return exists().where(
        WorkerRow.memory >= job.min_memory,
        or_(WorkerRow.queues.is_(None), any_(WorkerRow.queues) == job.queue),
        WorkerRow.state == "ready",
        WorkerRow.last_seen > func.now() - WORKER_SILENCE,
    )


async def forget_gone_workers(session: AsyncSession) -> None:
    await session.execute(delete(WorkerRow).where(WorkerRow.last_seen < func.now() - WORKERS_KEPT))


async def forget_staged_files(session: AsyncSession) -> None:
    """Those of attempts that have ended: a result has its own copies."""
    running = exists().where(
        AttemptRow.job_id == StagedRow.job_id, AttemptRow.number == StagedRow.attempt, AttemptRow.state == "running"
    )
    await session.execute(delete(StagedRow).where(~running).execution_options(synchronize_session=False))


async def scratch_files(session: AsyncSession) -> set[str]:
    """The digests of the files that attempts may still ask for."""
    return {*await session.scalars(select(StagedRow.digest).union(select(CheckpointRow.digest)))}


async def live_job_like(session: AsyncSession, spec: dict[str, Any]) -> UUID | None:
    """A job that gives what this specification gives and has not ended; it may end any time, unless it is locked."""
    statement = select(JobRow.id).where(JobRow.state.in_(LIVE), JobRow.spec == spec).order_by(JobRow.id).limit(1)
    return await session.scalar(statement)


async def lock_jobs(session: AsyncSession, jobs: Iterable[UUID]) -> dict[UUID, JobRow]:
    """Those of the jobs that there are, locked in one order by everybody."""
    statement = select(JobRow).where(JobRow.id.in_([*jobs])).order_by(JobRow.id).with_for_update()
    rows = await session.scalars(statement.execution_options(populate_existing=True))
    return {row.id: row for row in rows}


async def lock_prepared(session: AsyncSession, job: UUID) -> Sequence[JobRow]:
    """The jobs that were submitted for this one, or for others too, and have not ended; before the job is locked."""
    return [row for row in await lock_needs(session, job) if row.prepares and row.state in LIVE]


async def is_needed(session: AsyncSession, job: UUID) -> bool:
    """Whether a job that has not ended needs this one."""
    dependents = (
        select(NeedRow.job_id)
        .join(JobRow, JobRow.id == NeedRow.job_id)
        .where(NeedRow.needs_id == job, JobRow.state.in_(LIVE))
    )
    return bool(await session.scalar(select(exists(dependents))))


async def current_attempt(session: AsyncSession, job: JobRow) -> AttemptRow | None:
    return await session.get(AttemptRow, (job.id, job.attempt)) if job.attempt else None


async def attempt_actor(session: AsyncSession, job: UUID, number: int) -> str | None:
    """Whose token began an attempt; None if there is no such attempt."""
    return await session.scalar(select(AttemptRow.actor).where(AttemptRow.job_id == job, AttemptRow.number == number))


async def newest_report(session: AsyncSession, job: UUID, attempt: int) -> datetime | None:
    """When the newest event that this attempt reported happened, by the worker's clock."""
    return await session.scalar(
        select(EventRow.at)
        .where(EventRow.job_id == job, EventRow.attempt == attempt, EventRow.type.not_in(OWN_EVENTS))
        .order_by(EventRow.id.desc())
        .limit(1)
    )


async def staged_files(session: AsyncSession, job: UUID, attempt: int) -> dict[str, StagedRow]:
    """The files that the attempt has stored, by digest."""
    rows = await session.scalars(select(StagedRow).where(StagedRow.job_id == job, StagedRow.attempt == attempt))
    return {row.digest: row for row in rows}


async def checkpoints(session: AsyncSession, job: UUID) -> Sequence[CheckpointRow]:
    """Those that the next attempt may go on from, the newest first."""
    statement = (
        select(CheckpointRow)
        .where(CheckpointRow.job_id == job)
        .order_by(CheckpointRow.attempt.desc(), CheckpointRow.step.desc())
    )
    return (await session.scalars(statement)).all()


async def drop_checkpoints(session: AsyncSession, job: UUID, *, but: int = 0) -> None:
    """Forgets all but the newest; `forget.py` deletes the files."""
    for row in (await checkpoints(session, job))[but:]:
        await session.delete(row)


async def event_page(session: AsyncSession, job: UUID, after: int, limit: int) -> EventPage:
    # The state first: what has ended by then has all its events already, so `finished` is never said too early.
    state = _found(await session.scalar(select(JobRow.state).where(JobRow.id == job)), job)
    statement = select(EventRow).where(EventRow.job_id == job, EventRow.id > after).order_by(EventRow.id).limit(limit)
    items = [Event.model_validate(row) for row in await session.scalars(statement)]
    return EventPage(
        items=items,
        next_after=items[-1].id if items else after,
        finished=state in FINISHED and len(items) < limit,
    )


async def log_events(session: AsyncSession, job: UUID, after: int, limit: int, attempt: int | None) -> list[Event]:
    """Events that are read as lines of a log."""
    statement = select(EventRow).where(EventRow.job_id == job, EventRow.id > after, EventRow.type.in_(LOGGED))
    if attempt is not None:
        statement = statement.where(EventRow.attempt == attempt)
    return [Event.model_validate(row) for row in await session.scalars(statement.order_by(EventRow.id).limit(limit))]


def _found(row: T | None, job: UUID) -> T:
    if row is None:
        raise NotFound(f"there is no job {job}; see: tpv job list", reference=str(job))
    return row
