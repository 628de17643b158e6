"""What is tried again: by the service what is no fault of the job, by people whatever came to nothing."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession
from tests.service.jobs.conftest import QueueTables, Worker, event, look_for_lost_jobs, transfer, tune, tuned

from tpv import AsyncClient, errors
from tpv.schemas.jobs import RETRIED, Job
from tpv_service.jobs import lifecycle, stalled
from tpv_service.jobs.tables import JobRow
from tpv_service.queue import Queue
from tpv_service.settings import Settings

pytestmark = pytest.mark.anyio


async def lose(client: AsyncClient, job: Job, queue_tables: QueueTables, settings: Settings) -> Worker:
    """A worker takes the job and falls silent."""
    assert queue_tables.take(silent_for=31) == str(job.id)
    worker = await Worker.takes(client, job)
    await look_for_lost_jobs(settings)
    return worker


# --- By the service


async def test_one_look_is_not_enough_to_give_a_worker_up(
    registry: AsyncClient, settings: Settings, queue_tables: QueueTables
):
    job = await tune(registry)
    queue_tables.take(silent_for=31)
    worker = await Worker.takes(registry, job)
    await look_for_lost_jobs(settings, times=1)
    queue_tables.beat()
    await look_for_lost_jobs(settings, times=1)
    await worker.tells(event("log", message="still here"))

    assert (await registry.jobs.get(job)).state == "running"


async def test_lost_attempts_are_repeated_later_each_time_and_not_for_ever(
    registry: AsyncClient, settings: Settings, queue_tables: QueueTables
):
    job = await tune(registry)
    for _ in range(settings.retry_limit - 1):
        await lose(registry, job, queue_tables, settings)
        assert (await job.refresh()).state == "queued"
    await lose(registry, job, queue_tables, settings)
    await job.refresh()

    assert (job.state, job.reason) == ("failed", "worker-lost")
    assert job.message is not None
    assert job.message.startswith("10 attempts in a row came to nothing (TPV_RETRY_LIMIT); the last one: the worker is")
    assert [a.state for a in job.attempts] == ["superseded"] * 10
    assert queue_tables.entries()[str(job.id)] == ["aborted"] * 10


async def test_a_worker_that_starts_nothing_costs_no_attempt(
    registry: AsyncClient, settings: Settings, queue_tables: QueueTables
):
    job = await tune(registry)
    for _ in range(settings.retry_limit + 1):
        queue_tables.take()
        queue_tables.finish(queue_tables.entry(job.id))  # its token has expired, say
        await look_for_lost_jobs(settings)

    assert ((await job.refresh()).state, job.attempts) == ("queued", [])
    assert "has not started it" in str(job.message)


async def test_what_is_given_back_stands_before_what_came_later(registry: AsyncClient, queue_tables: QueueTables):
    jobs = [await tune(registry, f"v{i}", priority=priority) for i, priority in enumerate((0, 0, 1))]
    first, _, urgent = jobs
    worker = await Worker.takes(registry, first)
    await worker.fails("killed", "by signal SIGKILL")

    assert [queue_tables.take() for _ in jobs] == [str(urgent.id), str(first.id), str(jobs[1].id)]


async def test_an_attempt_that_hangs_is_given_up(registry: AsyncClient, settings: Settings, queue_tables: QueueTables):
    job = await tune(registry)
    worker = await Worker.takes(registry, job)
    await worker.tells(event("log", message="loads a file"))
    await look_for_lost_jobs(settings)
    assert (await job.refresh()).state == "running"

    await look_for_lost_jobs(settings.model_copy(update={"silent_after": timedelta(0)}))
    await job.refresh()
    assert (job.state, job.reason) == ("queued", "timeout")
    assert [(a.state, a.reason) for a in job.attempts] == [("superseded", "timeout")]
    assert queue_tables.entries()[str(job.id)] == ["doing", "todo"]
    assert queue_tables.abort_requested(job.id)  # so its worker ends the process
    with pytest.raises(errors.StaleAttempt):
        await worker.fails()
    assert queue_tables.disagreements() == []


async def test_a_job_that_was_taken_and_not_started_goes_to_another_worker(
    registry: AsyncClient, settings: Settings, queue_tables: QueueTables
):
    job = await tune(registry)
    queue_tables.take()
    await look_for_lost_jobs(settings)
    assert queue_tables.entries()[str(job.id)] == ["doing"]

    queue_tables.age(hours=1)
    await look_for_lost_jobs(settings)
    assert queue_tables.entries()[str(job.id)] == ["aborted", "todo"]
    assert (await Worker.takes(registry, job)).number == 1


async def test_what_goes_wrong_with_one_lost_job_does_not_keep_the_others(
    registry: AsyncClient, settings: Settings, queue_tables: QueueTables, monkeypatch: pytest.MonkeyPatch
):
    jobs = [await tune(registry, f"v{i}") for i in range(3)]
    for job in jobs:
        await Worker.takes(registry, job)
        queue_tables.hold(job.id, silent_for=31)

    async def give_back(session: AsyncSession, queue: Queue, job: JobRow, *members: Any) -> None:
        if job.id == jobs[0].id:
            raise OSError("the connection is gone")
        await lifecycle.give_back(session, queue, job, *members)

    monkeypatch.setattr(stalled, "give_back", give_back)
    await look_for_lost_jobs(settings)

    assert [(await job.refresh()).state for job in jobs] == ["running", "queued", "queued"]


async def test_pauses_double(registry: AsyncClient, settings: Settings, queue_tables: QueueTables):
    patient = settings.model_copy(update={"retry_pause": timedelta(hours=1)})
    pauses = []
    job = await tune(registry)
    for _ in range(4):
        await Worker.takes(registry, job)
        queue_tables.hold(job.id, silent_for=31)
        await look_for_lost_jobs(patient)
        pauses.append(round(queue_tables.pause(job.id) / 3600))

    assert pauses == [1, 2, 4, 8]
    assert queue_tables.take() is None


@pytest.mark.parametrize("reason", sorted(RETRIED))
async def test_what_is_no_fault_of_the_job_is_tried_again(
    registry: AsyncClient, queue_tables: QueueTables, reason: str
):
    job = await tune(registry)
    assert queue_tables.take() == str(job.id)
    worker = await Worker.takes(registry, job)
    given_back = await worker.fails(reason, "by signal SIGKILL")
    again = await worker.fails(reason, "by signal SIGKILL")  # the answer was lost, say

    assert (given_back.state, given_back.reason, given_back.message) == ("queued", reason, "by signal SIGKILL")
    assert again == given_back
    assert [(a.state, a.reason) for a in given_back.attempts] == [("failed", reason)]
    assert queue_tables.entries()[str(job.id)] == ["doing", "todo"]
    assert (await (await Worker.takes(registry, job)).succeeds(tuned(1))).state == "succeeded"


async def test_a_worker_that_stops_on_purpose_costs_no_attempt(registry: AsyncClient, settings: Settings):
    job = await tune(registry)
    for _ in range(settings.retry_limit + 1):
        given_back = await (await Worker.takes(registry, job)).fails("drained", "the worker stops")
        assert given_back.state == "queued"


async def test_an_entry_that_was_replaced_starts_nothing(
    registry: AsyncClient, settings: Settings, queue_tables: QueueTables
):
    job = await tune(registry)
    queue_tables.take(silent_for=31)
    frozen = queue_tables.entry(job.id)  # before it could say that it starts
    await look_for_lost_jobs(settings)
    queue_tables.take()
    second = await Worker.takes(registry, job)
    with pytest.raises(errors.StaleAttempt, match="given to another worker"):
        await registry.jobs.start_attempt(job, "one", frozen)

    assert (second.number, (await registry.jobs.get(job)).state) == (1, "running")


async def test_an_entry_that_no_worker_was_given_starts_nothing(registry: AsyncClient, queue_tables: QueueTables):
    job = await tune(registry)
    with pytest.raises(errors.StaleAttempt, match="nobody was given its entry"):
        await registry.jobs.start_attempt(job, "guesses", queue_tables.entry(job.id))

    assert (await registry.jobs.get(job)).state == "queued"
    assert queue_tables.entries()[str(job.id)] == ["todo"]


# --- By people


@pytest.mark.parametrize("end", ["failed", "cancelled"])
async def test_a_job_is_taken_up_again(registry: AsyncClient, queue_tables: QueueTables, end: str):
    job = await tune(registry)
    assert queue_tables.take() == str(job.id)
    worker = await Worker.takes(registry, job)
    await (worker.fails() if end == "failed" else job.cancel())
    await job.retry()

    assert (job.state, job.reason, job.message, job.finished_at) == ("queued", None, "retried by local", None)
    assert queue_tables.entries()[str(job.id)] == ["doing", "todo"]
    with pytest.raises(errors.StaleAttempt):
        await worker.succeeds(tuned(2))
    assert queue_tables.take() == str(job.id)
    done = await (await Worker.takes(registry, job)).succeeds(tuned(1))
    assert [attempt.number for attempt in done.attempts] == [1, 2]


async def test_attempts_lost_in_a_row_are_counted_anew(
    registry: AsyncClient, settings: Settings, queue_tables: QueueTables
):
    job = await tune(registry)
    for _ in range(settings.retry_limit):
        await lose(registry, job, queue_tables, settings)
    await (await job.refresh()).retry()
    await lose(registry, job, queue_tables, settings)

    assert (await job.refresh()).state == "queued"


async def test_what_is_on_its_way_or_done_is_not_retried(registry: AsyncClient):
    job = await tune(registry)
    for state in ("queued", "running", "succeeded"):
        with pytest.raises(errors.Conflict, match=f"is {state}; only a failed or cancelled one"):
            await registry.jobs.retry(job)
        if state == "queued":
            worker = await Worker.takes(registry, job)
        elif state == "running":
            await worker.succeeds(tuned(1))


async def test_one_key_retries_once(registry: AsyncClient, http, queue_tables: QueueTables):
    job = await (await tune(registry)).cancel()
    post = {"url": f"/api/v1/jobs/{job.id}/retry", "json": {}, "headers": {"Idempotency-Key": "k"}}
    answers = [await http.post(**post) for _ in range(2)]

    assert [answer.json()["state"] for answer in answers] == ["queued", "queued"]
    assert queue_tables.entries()[str(job.id)] == ["cancelled", "todo"]


async def test_jobs_that_failed_because_of_it_wait_again(registry: AsyncClient, queue_tables: QueueTables):
    own = await tune(registry, "own")
    job = await tune(registry, "other", needs=[own])
    await (await Worker.takes(registry, own)).fails()
    with pytest.raises(errors.Conflict, match=f"retry first: tpv job retry {own.id}"):
        await registry.jobs.retry(job)
    await own.retry()
    await job.refresh()

    assert (job.state, job.reason, job.finished_at) == ("queued", "waiting", None)
    assert str(job.id) not in queue_tables.entries()
    await (await Worker.takes(registry, own)).succeeds(tuned(1))
    assert queue_tables.entries()[str(job.id)] == ["todo"]
    assert (await Worker.takes(registry, job)).number == 1


async def test_a_retried_job_waits_for_what_it_needs(registry: AsyncClient, queue_tables: QueueTables):
    job = await transfer(registry)
    own = await registry.jobs.get(job.needs[0])
    await job.cancel()
    await own.refresh()
    if own.finished:
        await own.retry()
    await job.retry()

    assert (job.state, job.reason) == ("queued", "waiting")
    await (await Worker.takes(registry, own)).succeeds(tuned(1))
    assert queue_tables.entries()[str(job.id)] == ["todo"]
