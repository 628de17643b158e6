"""Who takes jobs, which of them may start a job, and in what order."""

from __future__ import annotations

import pytest
from tests.service.jobs.conftest import QueueTables, Worker, silent, there, tune

from tpv import AsyncClient, errors
from tpv.schemas.jobs import Job
from tpv_service.db import create_engine, create_sessionmaker
from tpv_service.jobs.held import release_all_held
from tpv_service.jobs.queries import WORKER_SILENCE
from tpv_service.queue import Queue
from tpv_service.settings import Settings

pytestmark = pytest.mark.anyio

GB = 10**9


async def release(settings: Settings) -> None:
    """What the service does every few seconds with jobs that were held back."""
    engine, queue = create_engine(settings), Queue(settings)
    async with queue.opened():
        await release_all_held(create_sessionmaker(engine), queue)
    await engine.dispose()


async def refused(client: AsyncClient, job: Job, worker: str, text: str) -> None:
    with pytest.raises(errors.NotNow, match=text):
        await Worker.takes(client, job, worker)


# --- Who is there


async def test_workers_say_what_they_can_do(registry: AsyncClient, settings: Settings):
    job = await tune(registry)
    await there(registry, "gpu-1", 24 * GB, dtypes=["float32", "bfloat16"], models=["t5-base"], concurrency=2)
    await there(registry, "cpu-1", queues=["small"], versions={"torch": "2.13"})
    await Worker.takes(registry, job, "gpu-1")
    cpu, gpu = [worker async for worker in registry.workers.list(page_size=1)]

    assert (gpu.name, gpu.state, gpu.memory, gpu.dtypes) == ("gpu-1", "ready", 24 * GB, ["float32", "bfloat16"])
    assert (gpu.models, gpu.concurrency, gpu.queues, gpu.jobs) == (["t5-base"], 2, None, [job.id])
    assert (cpu.name, cpu.queues, cpu.versions, cpu.jobs) == ("cpu-1", ["small"], {"torch": "2.13"}, [])

    await there(registry, "gpu-1", 24 * GB, state="draining")
    assert [worker.state async for worker in registry.workers.list()] == ["ready", "draining"]
    await silent(settings, WORKER_SILENCE.total_seconds() + 1)
    assert [worker.state async for worker in registry.workers.list()] == ["gone", "gone"]
    await there(registry, "gpu-1")
    assert [worker.state async for worker in registry.workers.list()] == ["gone", "ready"]


# --- Memory


async def test_a_job_starts_where_there_is_memory_for_it(registry: AsyncClient, queue_tables: QueueTables):
    await there(registry, "small", 8 * GB)
    await there(registry, "large", 25 * GB)
    job = await tune(registry, min_memory="24GB")
    assert job.min_memory == 24 * GB
    assert queue_tables.take() == str(job.id)
    await refused(registry, job, "small", r"waits for a worker with 24.0GB of memory")
    await job.refresh()

    assert (job.state, job.reason, job.message) == ("queued", "waiting", "waits for a worker with 24.0GB of memory")
    assert job.attempts == []
    assert queue_tables.entries()[str(job.id)] == ["doing", "todo"]  # for another worker, a little later
    assert 0 < queue_tables.pause(job.id) <= 2
    with pytest.raises(errors.NotNow):
        await Worker.takes(registry, job, "unknown")
    assert (await Worker.takes(registry, job, "large")).number == 1
    assert [e.data["reason"] for e in (await registry.jobs.events(job)).items] == [None, "waiting", None]


async def test_it_waits_outside_the_queue_until_such_a_worker_is_there(
    registry: AsyncClient, settings: Settings, queue_tables: QueueTables
):
    await there(registry, "small", 8 * GB)
    job, other = await tune(registry, min_memory=24 * GB), await tune(registry, "other")
    assert queue_tables.take() == str(job.id)
    await there(registry, "of-another-queue", 24 * GB, queues=["large"])
    await refused(registry, job, "small", "waits for a worker")
    await release(settings)
    assert queue_tables.entries()[str(job.id)] == ["doing"]
    assert queue_tables.take() == str(other.id)

    await there(registry, "large", 24 * GB)
    await release(settings)
    assert queue_tables.take() == str(job.id)
    assert (await Worker.takes(registry, job, "large")).number == 1


async def test_memory_is_a_size(registry: AsyncClient):
    assert (await tune(registry, min_memory="24GiB")).min_memory == 24 * 2**30
    for wrong in ("much", -1, 0):
        with pytest.raises(errors.Invalid, match="min_memory"):
            await tune(registry, min_memory=wrong)


# --- Order


async def test_jobs_are_taken_by_priority_and_then_in_their_order(registry: AsyncClient, queue_tables: QueueTables):
    priorities = [0, 5, -1, 5, 0]
    jobs = [await tune(registry, f"v{i}", priority=priority) for i, priority in enumerate(priorities)]

    assert [queue_tables.take() for _ in jobs] == [str(jobs[i].id) for i in (1, 3, 0, 4, 2)]
