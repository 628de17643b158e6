"""Workers say what they can do, again and again; others see who is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends
from sqlalchemy import or_, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from tpv.errors import Conflict
from tpv.schemas.base import Page
from tpv.schemas.workers import Worker, WorkerReport
from tpv_service.auth.tokens import Actor, Allowed
from tpv_service.db import Session
from tpv_service.jobs import queries
from tpv_service.jobs.tables import AttemptRow, WorkerRow
from tpv_service.pagination import PagingQuery, page

router = APIRouter(tags=["workers"], prefix="/workers")


@router.post("")
async def report_worker(
    session: Session, actor: Annotated[Actor, Depends(Allowed("worker"))], report: WorkerReport
) -> Worker:
    """A worker says what it can do and that it is there. One of its name that is there has the same token."""
    now = datetime.now(UTC)
    values = {**report.model_dump(), "actor": actor.name, "last_seen": now}
    its_own = or_(
        WorkerRow.actor == actor.name, WorkerRow.state == "gone", WorkerRow.last_seen < now - queries.WORKER_SILENCE
    )
    statement = insert(WorkerRow).values(values)
    statement = statement.on_conflict_do_update(index_elements=[WorkerRow.name], set_=values, where=its_own)
    fresh = {"populate_existing": True}
    row = (await session.scalars(statement.returning(WorkerRow), execution_options=fresh)).one_or_none()
    if row is None:
        raise Conflict(f"a worker {report.name} with another token is there; give this one another name (TPV_NAME)")
    return _view(row, await _jobs_of(session, [row.name]))


@router.get("")
async def list_workers(
    session: Session, _: Annotated[Actor, Depends(Allowed("read", "write", "worker"))], paging: PagingQuery
) -> Page[Worker]:
    """All workers by name; those that were not seen for a week are forgotten."""
    found = await page(session, select(WorkerRow), [WorkerRow.name], lambda row: [row.name], lambda row: row, paging)
    jobs = await _jobs_of(session, [row.name for row in found.items])
    return Page(items=[_view(row, jobs) for row in found.items], next_cursor=found.next_cursor)


async def _jobs_of(session: AsyncSession, workers: Sequence[str]) -> Mapping[str, list[UUID]]:
    """What each of the workers works on."""
    statement = select(AttemptRow.worker, AttemptRow.job_id).where(
        AttemptRow.state == "running", AttemptRow.worker.in_(workers)
    )
    found: dict[str, list[UUID]] = {}
    for worker, job in await session.execute(statement.order_by(AttemptRow.job_id)):
        found.setdefault(worker, []).append(job)
    return found


def _view(row: WorkerRow, jobs: Mapping[str, list[UUID]]) -> Worker:
    silent = row.last_seen < datetime.now(UTC) - queries.WORKER_SILENCE
    members = {name: getattr(row, name) for name in Worker.model_fields if name not in ("jobs", "state")}
    return Worker(**members, state="gone" if silent else row.state, jobs=jobs.get(row.name, []))
