"""The queue: Procrastinate, deferred to in the same transaction that writes the job's row.

An entry of the queue is one delivery of a job: when its worker is lost, the entry is ended and a new one takes its
place. So whatever a worker that was given up does to its own entry later, the job's present one is not touched.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

from procrastinate import App, PsycopgConnector
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from tpv_service.db import QUEUE_SCHEMA
from tpv_service.settings import Settings

STARTED_WITHIN = 4  #: times TPV_STALLED_AFTER: a worker that has taken a job starts it at once, or asks for a while
TASK = "tpv.run_job"  #: the worker's task; named here, imported never


class Lost(NamedTuple):
    """A job that has not ended, and its entry in the queue, which nobody works on any more."""

    job: UUID
    queue_id: int
    held: bool  #: by a worker that has gone silent; else the entry has ended, or was never followed by a start
    heartbeat: datetime | None  #: the worker's last one


_LOST = text(
    f"""
    select jobs.id, jobs.queue_id,
           entry.status is not distinct from 'doing'
               and (worker.id is null or worker.last_heartbeat < now() - :silence),
           worker.last_heartbeat
    from jobs
    left join {QUEUE_SCHEMA}.procrastinate_jobs entry on entry.id = jobs.queue_id
    left join {QUEUE_SCHEMA}.procrastinate_workers worker on worker.id = entry.worker_id
    where jobs.state in ('queued', 'running') and jobs.queue_id is not null
      and (entry.id is null
           or entry.status not in ('todo', 'doing')
           or entry.status = 'doing' and (worker.id is null or worker.last_heartbeat < now() - :silence)
           or entry.status = 'doing' and jobs.state = 'queued' and not exists (
                select from {QUEUE_SCHEMA}.procrastinate_events event
                where event.job_id = entry.id and event.at > now() - {STARTED_WITHIN} * :silence))
    order by jobs.id
    """  # noqa: S608 # only a constant is put in
)

_GIVEN = text(
    f"select status = 'doing' from {QUEUE_SCHEMA}.procrastinate_jobs where id = :queue_id"  # noqa: S608 # a constant
)

# What the queue's own `finish_job_by_id_async` does, but for the error when the worker was quicker.
_END = text(
    f"update {QUEUE_SCHEMA}.procrastinate_jobs set status = 'aborted', abort_requested = false"  # noqa: S608 # a constant
    " where id = :queue_id and status = 'doing'"
)


class Queue:
    """What the service does with the queue; the worker takes from it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        url = settings.database_url.get_secret_value().replace("postgresql+psycopg://", "postgresql://")
        self.app = App(
            connector=PsycopgConnector(
                conninfo=url,
                kwargs={"options": f"-c search_path={QUEUE_SCHEMA}"},
                min_size=0,  # the service starts without a database too
                max_size=1,
                timeout=10,  # seconds to wait for a connection
            )
        )

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        async with self.app.open_async():
            yield

    async def defer(
        self,
        session: AsyncSession,
        job: UUID,
        *,
        queue: str,
        priority: int,
        first: bool = False,
        after: timedelta = timedelta(0),
    ) -> int:
        """Puts the job in the queue when the session commits; a rollback takes it away. Gives the queue's own id.

        It stands behind the others of its priority, or `first`, before those that do not. No worker takes it before
        the time `after` has passed.
        """
        async with session.begin_nested():  # an error of the queue leaves the caller's transaction whole
            return await self.app.configure_task(
                TASK,
                queue=queue,
                priority=2 * priority + first,
                schedule_at=datetime.now(UTC) + after if after else None,
                connection=await _driver_connection(session),
            ).defer_async(job=str(job))

    async def has_given(self, session: AsyncSession, queue_id: int) -> bool:
        """Whether a worker has taken the entry, and nobody has ended it since."""
        return bool(await session.scalar(_GIVEN, {"queue_id": queue_id}))

    async def cancel(self, session: AsyncSession, queue_id: int) -> None:
        """Takes a waiting entry away, or tells its worker to stop; when the session commits."""
        await self.app.job_manager.cancel_job_by_id_async(
            queue_id, abort=True, connection=await _driver_connection(session)
        )

    async def lost(self, session: AsyncSession) -> Sequence[Lost]:
        """Jobs whose worker has been silent for too long, or whose entry has ended although they have not."""
        return [Lost(*row) for row in await session.execute(_LOST, {"silence": self.settings.stalled_after})]

    async def end(self, session: AsyncSession, queue_id: int) -> None:
        """Ends an entry that a lost worker holds, when the session commits; whatever it does then is for nothing."""
        await session.execute(_END, {"queue_id": queue_id})

    async def forget_ended(self) -> None:
        """Deletes entries that ended over a day ago; their jobs say what came of them."""
        await self.app.job_manager.delete_old_jobs(
            24, include_failed=True, include_cancelled=True, include_aborted=True
        )


async def _driver_connection(session: AsyncSession) -> Any:
    """The psycopg connection that carries the session's transaction."""
    return (await (await session.connection()).get_raw_connection()).driver_connection
