"""What a user sees and what the queue holds cannot disagree: a change that dies at any statement has not been."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from tests.service.jobs.conftest import QueueTables, Worker, transfer, tune, tuned

from tpv import AsyncClient, files
from tpv.schemas.jobs import AttemptStart, FailureReport, Job, JobCreate, ResultReport
from tpv_service.db import create_engine, create_sessionmaker
from tpv_service.jobs.cancel import cancel_job
from tpv_service.jobs.report import Stores, report_failure, report_result, start_attempt
from tpv_service.jobs.retry import retry_job
from tpv_service.jobs.stalled import LostJobs
from tpv_service.jobs.submit import resolve_job, submit_job
from tpv_service.queue import Queue
from tpv_service.settings import Settings
from tpv_service.storage import create_scratch, create_store

pytestmark = pytest.mark.anyio

Sessions = async_sessionmaker[AsyncSession]
STAGED = files.dump({"prompt": tuned(1)})


class Died(BaseException):
    """The process is gone."""


@contextmanager
def dying(engine: AsyncEngine, statement: int) -> Iterator[None]:
    """The connection is lost before the statement of this number, counted from 1; a commit is one too."""
    left = statement

    def one_less(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Died

    points = ("before_cursor_execute", "commit", "savepoint", "release_savepoint")
    for point in points:
        event.listen(engine.sync_engine, point, one_less)
    try:
        yield
    finally:
        for point in points:
            event.remove(engine.sync_engine, point, one_less)


async def submitting(sessions: Sessions, queue: Queue, job: Job) -> None:
    request = JobCreate.model_validate(
        {"method": "dtvg", "target": "new", "sources": ["mnli"], "dataset": "cr", "output": "new-dtvg"}
    )
    async with sessions.begin() as session:
        resolved = await resolve_job(None, session, request)  # type: ignore[arg-type] # only a reference pool needs it
        await submit_job(session, queue, request, *resolved, "local")


async def cancelling(sessions: Sessions, queue: Queue, job: Job) -> None:
    async with sessions.begin() as session:
        await cancel_job(session, queue, job.id, "local")


async def retrying(sessions: Sessions, queue: Queue, job: Job) -> None:
    async with sessions.begin() as session:
        await retry_job(session, queue, job.needs[0], "local", fresh=True)


async def failing(sessions: Sessions, queue: Queue, job: Job) -> None:
    async with sessions.begin() as session:
        await report_failure(session, queue, job.needs[0], 1, FailureReport(reason="data", message="no such column"))


async def giving_back(sessions: Sessions, queue: Queue, job: Job) -> None:
    async with sessions.begin() as session:
        await report_failure(session, queue, job.needs[0], 1, FailureReport(reason="killed", message="by SIGKILL"))


async def starting(sessions: Sessions, queue: Queue, job: Job) -> None:
    """Another worker begins; the attempt that runs is superseded."""
    async with sessions.begin() as session:
        entry = Worker.queue.entry(job.needs[0])
        await start_attempt(session, queue, job.needs[0], AttemptStart(worker="host:2", entry=entry), "local")


async def succeeding(sessions: Sessions, queue: Queue, job: Job) -> None:
    """The version appears, and the job that waits for it goes into the queue."""
    figure = {"split": "test", "metric": "accuracy", "value": 0.5, "n": 4, "dataset": "cr"}
    result = ResultReport.model_validate({"prompt": files.digest(STAGED), "evaluations": [figure]})
    async with sessions() as session:  # its transaction ends where files move
        stores = Stores(create_store(queue.settings), create_scratch(queue.settings))
        await report_result(session, stores, queue, job.needs[0], 1, result)
        await session.commit()


async def looking(sessions: Sessions, queue: Queue, job: Job) -> None:
    lost_jobs = LostJobs(sessions, queue)
    await lost_jobs.look()
    await lost_jobs.look()


@pytest.mark.parametrize(
    "change", [submitting, cancelling, retrying, starting, succeeding, failing, giving_back, looking]
)
async def test_a_change_that_dies_at_any_statement_has_not_been(
    registry: AsyncClient,
    settings: Settings,
    queue_tables: QueueTables,
    change: Callable[[Sessions, Queue, Job], Awaitable[None]],
):
    job = await transfer(registry)
    await tune(registry, "other")
    assert queue_tables.take(silent_for=31 if change is looking else 0) == str(job.needs[0])
    worker = await Worker.takes(registry, await registry.jobs.get(job.needs[0]))
    await registry.jobs.save_checkpoint(job.needs[0], 1, 10, b"state")
    await registry.jobs.stage(job.needs[0], 1, STAGED)
    if change is retrying:
        await worker.fails()
    before = queue_tables.everything()
    engine, queue, deaths = create_engine(settings), Queue(settings), 0
    async with queue.opened():
        while True:
            try:
                with dying(engine, deaths + 1):
                    await change(create_sessionmaker(engine), queue, job)
            except Died:
                deaths += 1
                assert queue_tables.everything() == before
            else:
                break
    await engine.dispose()

    assert deaths > 5
    assert queue_tables.everything() != before
    assert queue_tables.disagreements() == []
