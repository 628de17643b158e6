"""A small registry to submit jobs to, and the reports of a worker."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any, ClassVar, LiteralString
from uuid import UUID

import numpy as np
import psycopg
import pytest
from numpy.typing import NDArray
from sqlalchemy import update

import tpv
from tpv import files
from tpv.schemas.jobs import Checkpoint, EvaluationReport, EventReport, FailureReport, Job, ResultReport
from tpv.schemas.workers import WorkerReport
from tpv_service.db import create_engine, create_sessionmaker
from tpv_service.jobs.stalled import LostJobs
from tpv_service.jobs.tables import WorkerRow
from tpv_service.queue import Queue
from tpv_service.settings import Settings

SHAPE = (4, 8)
START = np.linspace(-1, 1, 32, dtype=np.float32).reshape(SHAPE)  #: P_init
ROWS = [{"source": f"text {i}", "target": "yes" if i % 2 else "no"} for i in range(8)]


def tuned(change: float) -> NDArray[np.float32]:
    """A soft prompt P* that some tuning may have given."""
    return START + np.float32(change) * np.eye(*SHAPE, dtype=np.float32)


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """A lost job is tried again at once."""
    return settings.model_copy(update={"retry_pause": timedelta(0)})


@pytest.fixture
async def registry(client: tpv.AsyncClient) -> tpv.AsyncClient:
    """The initialization `family`, the data set `cr`, and source vectors `mnli` and `qnli`."""
    await client.initializations.create("family", base_model="/models/t5", unpinned=True, tensor=START)
    await client.datasets.upload("cr", ROWS, ROWS[:4], label_words=["yes", "no"])
    for name, change in (("mnli", 0.5), ("qnli", 0.25)):
        await client.vectors.register(name, prompt=tuned(change), initialization="family", task=name)
    return client


async def tune(client: tpv.AsyncClient, output: str | None = "cr-own", **changes: object) -> Job:
    members = {"dataset": "cr", "initialization": "family", "output": output, "steps": 5, **changes}
    return await client.jobs.tune(**members)  # type: ignore[arg-type]


async def transfer(client: tpv.AsyncClient, **changes: object) -> Job:
    members = {"target": "cr-own", "sources": ["mnli", "qnli"], "dataset": "cr", "output": "cr-dtvg", **changes}
    return await client.jobs.transfer(**members)  # type: ignore[arg-type]


@dataclass
class Worker:
    """What a worker reports of one attempt."""

    client: tpv.AsyncClient
    job: UUID
    number: int
    checkpoints: list[Checkpoint] = field(default_factory=list)

    queue: ClassVar[QueueTables]  #: of the test that runs

    @classmethod
    async def takes(cls, client: tpv.AsyncClient, job: Job, name: str = "host:1") -> Worker:
        """Begins an attempt, as the worker to which the queue has given the job's newest entry, or gives it now."""
        started = await client.jobs.start_attempt(job, name, cls.queue.given(job.id))
        return cls(client, job.id, started.number, started.checkpoints)

    async def reads(self, checkpoint: Checkpoint) -> bytes:
        return await self.client.jobs.checkpoint(self.job, self.number, checkpoint.digest)

    async def tells(self, *events: EventReport) -> None:
        await self.client.jobs.report_events(self.job, self.number, events)

    async def stages(self, prompt: NDArray[np.float32]) -> str:
        staged = await self.client.jobs.stage(self.job, self.number, files.dump({"prompt": prompt}))
        return staged.digest

    async def succeeds(self, prompt: NDArray[np.float32], **members: object) -> Job:
        return await self.client.jobs.complete(
            self.job,
            self.number,
            ResultReport.model_validate({"prompt": await self.stages(prompt), **members}),
        )

    async def fails(self, reason: str = "data", message: str = "no such column") -> Job:
        failure = FailureReport(reason=reason, message=message)  # type: ignore[arg-type]
        return await self.client.jobs.fail(self.job, self.number, failure)


async def there(client: tpv.AsyncClient, name: str, memory: int | None = None, **members: object) -> None:
    """A worker says that it is there."""
    report = {"name": name, "device": "cuda:0", "memory": memory, **members}
    await client.workers.report(WorkerReport.model_validate(report))


async def silent(settings: Settings, seconds: float) -> None:
    """All workers have said nothing for so long."""
    engine = create_engine(settings)
    async with create_sessionmaker(engine).begin() as session:
        await session.execute(update(WorkerRow).values(last_seen=WorkerRow.last_seen - timedelta(seconds=seconds)))
    await engine.dispose()


async def look_for_lost_jobs(settings: Settings, times: int = 2) -> None:
    """What the service does every few seconds."""
    engine, queue = create_engine(settings), Queue(settings)
    lost_jobs = LostJobs(create_sessionmaker(engine), queue)
    async with queue.opened():
        for _ in range(times):
            await lost_jobs.look()
    await engine.dispose()


_ticks = count()


def event(kind: str, **data: object) -> EventReport:
    at = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=next(_ticks))
    return EventReport(type=kind, at=at, data=data)  # type: ignore[arg-type]


def figure(value: float, predictions: str | None = None) -> EvaluationReport:
    return EvaluationReport(
        dataset="default/cr:1", split="validation", metric="accuracy", value=value, seed=0, n=4, predictions=predictions
    )


@dataclass
class QueueTables:
    """Looks into the queue, and plays its workers."""

    url: str

    def entries(self) -> dict[str, list[str]]:
        """The states of each job's entries, oldest first."""
        found: dict[str, list[str]] = {}
        for job, status in self._ask("select args->>'job', status::text from procrastinate_jobs order by id"):
            found.setdefault(job, []).append(status)
        return found

    def take(self, *, silent_for: float = 0) -> str | None:
        """A worker, whose last heartbeat is so many seconds old, takes the next entry; gives its job, if one is due."""
        [[worker]] = self._ask(
            "insert into procrastinate_workers (last_heartbeat) values (now() - %s * interval '1 s') returning id",
            silent_for,
        )
        [[job]] = self._ask("select args->>'job' from procrastinate_fetch_job_v2(null, %s)", worker)
        return None if job is None else str(job)

    def hold(self, job: UUID, *, silent_for: float) -> None:
        """A worker that was so long silent has the job's newest entry, whenever that was due."""
        self._ask(
            "with worker as (insert into procrastinate_workers (last_heartbeat)"
            " values (now() - %s * interval '1 s') returning id)"
            " update procrastinate_jobs set status = 'doing', worker_id = worker.id from worker"
            " where procrastinate_jobs.id = %s returning worker.id",
            silent_for,
            self.entry(job),
        )

    def given(self, job: UUID) -> int:
        """The id of the job's newest entry, which a worker takes now, unless one has it."""
        entry = self.entry(job)
        if self._ask("select from procrastinate_jobs where id = %s and status = 'todo'", entry):
            self.hold(job, silent_for=0)
        return entry

    def entry(self, job: UUID) -> int:
        """The id of the job's newest entry; 0 if it never had one."""
        [[entry]] = self._ask("select coalesce(max(id), 0) from procrastinate_jobs where args->>'job' = %s", str(job))
        return int(entry)

    def beat(self) -> None:
        """Every worker has sent a heartbeat since, though the last one is too old again."""
        self._ask("update procrastinate_workers set last_heartbeat = now() - interval '31 s' returning id")

    def age(self, *, hours: float) -> None:
        """Whatever has happened to entries happened so much earlier."""
        self._ask("update procrastinate_events set at = at - %s * interval '1 hour' returning id", hours)

    def pause(self, job: UUID) -> float:
        """Seconds from now until the job's newest entry may be taken."""
        [[seconds]] = self._ask(
            "select extract(epoch from coalesce(scheduled_at - now(), '0 s')) from procrastinate_jobs where id = %s",
            self.entry(job),
        )
        return float(seconds)

    def finish(self, entry: int) -> None:
        """The worker that took the entry says that it is through with it."""
        self._ask("select procrastinate_finish_job_v1(%s, 'succeeded', false)", entry)

    def abort_requested(self, job: UUID) -> bool:
        """Whether a worker of the job is told to stop."""
        query = "select coalesce(bool_or(abort_requested), false) from procrastinate_jobs where args->>'job' = %s"
        [[requested]] = self._ask(query, str(job))
        return bool(requested)

    def everything(self) -> list[Any]:
        """All that a change of a job may change."""
        return [
            self._ask("select id, state, reason, message, queue_id, attempt, lost from public.jobs order by id"),
            self._ask("select job_id, number, state, reason from public.attempts order by 1, 2"),
            self._ask("select job_id, type, data from public.job_events order by id"),
            self._ask("select job_id, attempt, step from public.checkpoints order by 1, 2, 3"),
            self._ask("select vector_id, number, fingerprint from public.versions order by 1, 2"),
            self._ask("select version_id, metric, value from public.evaluations order by 1, 2, 3"),
            self._ask("select * from public.parents order by 1, 2"),
            self._ask("select args, status, abort_requested from procrastinate_jobs order by id"),
        ]

    def disagreements(self) -> list[Any]:
        """Jobs of which the service and the queue say different things."""
        return self._ask(
            "select jobs.id, jobs.state, jobs.reason, array_agg(entry.status order by entry.id) from public.jobs"
            " left join procrastinate_jobs entry on entry.args->>'job' = jobs.id::text"
            "  and (entry.status = 'todo' or entry.status = 'doing' and not entry.abort_requested)"
            " group by jobs.id having case"
            "  when jobs.state = 'running' then array_agg(entry.id) <> array[jobs.queue_id] or bool_or(status = 'todo')"
            "  when jobs.state = 'queued' and jobs.queue_id is not null"
            "   then not coalesce(jobs.queue_id = any(array_agg(entry.id) filter (where status = 'todo')), false)"
            "    or count(*) filter (where status = 'todo') <> 1"
            "  else bool_or(status = 'todo') end"
        )

    def _ask(self, query: LiteralString, *parameters: object) -> list[Any]:
        with psycopg.connect(self.url, autocommit=True, options="-c search_path=procrastinate") as connection:
            return connection.execute(query, parameters).fetchall()


@pytest.fixture(autouse=True)
def queue_tables(settings: Settings) -> QueueTables:
    Worker.queue = QueueTables(settings.database_url.get_secret_value().replace("+psycopg", ""))
    return Worker.queue
