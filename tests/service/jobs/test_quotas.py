"""How many jobs of one owner run at a time."""

from __future__ import annotations

import pytest
from tests.service.jobs.conftest import QueueTables, Worker, look_for_lost_jobs, tune, tuned
from tests.service.jobs.test_workers import refused, release

from tpv import AsyncClient
from tpv_service.settings import Settings

pytestmark = pytest.mark.anyio


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"jobs_per_owner": 2})


async def test_an_owner_has_so_many_running_jobs(registry: AsyncClient, queue_tables: QueueTables):
    jobs = [await tune(registry, f"v{i}") for i in range(5)]
    workers = []
    for job in jobs[:2]:
        assert queue_tables.take() == str(job.id)
        workers.append(await Worker.takes(registry, job))
    for job in jobs[2:]:
        assert queue_tables.take() == str(job.id)
        await refused(registry, job, "host:1", "waits until local has fewer than 2 running jobs")
    assert queue_tables.take() is None
    assert (await jobs[2].refresh()).reason == "waiting"

    await workers[0].succeeds(tuned(1))
    assert queue_tables.take() == str(jobs[2].id)
    assert queue_tables.take() is None
    third = await Worker.takes(registry, jobs[2])
    await third.fails()
    await workers[1].fails("drained", "the worker stops")  # a slot is free, and its job is in the queue again
    taken = {queue_tables.take(), queue_tables.take(), queue_tables.take()}
    assert taken == {str(jobs[1].id), str(jobs[3].id), str(jobs[4].id)}


async def test_the_first_of_those_that_wait_is_the_one_of_highest_priority(
    registry: AsyncClient, queue_tables: QueueTables
):
    running = [await Worker.takes(registry, await tune(registry, f"v{i}")) for i in range(2)]
    low, high = await tune(registry, "low"), await tune(registry, "high", priority=3)
    for job in (low, high):
        await refused(registry, job, "host:1", "waits until")
    await running[0].succeeds(tuned(1))

    assert [(await job.refresh()).reason for job in (low, high)] == ["waiting", None]


async def test_a_cancelled_job_makes_room(registry: AsyncClient):
    running = [await tune(registry, f"v{i}") for i in range(2)]
    for job in running:
        await Worker.takes(registry, job)
    waiting = await tune(registry, "next")
    await refused(registry, waiting, "host:1", "waits until")
    await running[1].cancel()

    assert (await Worker.takes(registry, waiting)).number == 1


async def test_a_lost_worker_makes_room(registry: AsyncClient, settings: Settings, queue_tables: QueueTables):
    running = [await tune(registry, f"v{i}") for i in range(2)]
    for job in running:
        queue_tables.take(silent_for=31)
        await Worker.takes(registry, job)
    waiting = await tune(registry, "next")
    await refused(registry, waiting, "host:1", "waits until")
    await look_for_lost_jobs(settings)

    assert (await Worker.takes(registry, waiting)).number == 1


async def test_nothing_waits_for_a_limit_that_is_gone(
    registry: AsyncClient, settings: Settings, queue_tables: QueueTables
):
    for i in range(2):
        await Worker.takes(registry, await tune(registry, f"v{i}"))
    waiting = await tune(registry, "next")
    await refused(registry, waiting, "host:1", "waits until")
    await release(settings)
    assert queue_tables.entries()[str(waiting.id)] == ["doing"]  # the entry by which it was refused
    await release(settings.model_copy(update={"jobs_per_owner": None}))

    assert queue_tables.entries()[str(waiting.id)] == ["doing", "todo"]
