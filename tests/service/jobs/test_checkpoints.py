"""What an attempt leaves for the next one to go on from."""

from __future__ import annotations

import pytest
from tests.service.jobs.conftest import QueueTables, Worker, event, look_for_lost_jobs, tune, tuned

from tpv import AsyncClient, errors
from tpv_service.settings import Settings

pytestmark = pytest.mark.anyio


async def test_the_next_attempt_is_told_of_the_newest_two(registry: AsyncClient):
    job = await tune(registry)
    first = await Worker.takes(registry, job)
    for step in (10, 20, 30):
        await registry.jobs.save_checkpoint(job, 1, step, f"state after {step}".encode())
    second = await Worker.takes(registry, job)

    assert first.checkpoints == []
    assert [(c.attempt, c.step, c.size) for c in second.checkpoints] == [(1, 30, 14), (1, 20, 14)]
    assert [await second.reads(c) for c in second.checkpoints] == [b"state after 30", b"state after 20"]
    await registry.jobs.save_checkpoint(job, 2, 25, b"it had begun with the one after 20")
    third = await Worker.takes(registry, job)
    assert [(c.attempt, c.step) for c in third.checkpoints] == [(2, 25), (1, 30)]


async def test_a_checkpoint_is_an_event_once(registry: AsyncClient):
    job = await tune(registry)
    worker = await Worker.takes(registry, job)
    early = event("progress", step=9, steps=50, loss=1.0)
    saved = await registry.jobs.save_checkpoint(job, 1, 10, b"state")
    again = await registry.jobs.save_checkpoint(job, 1, 10, b"state")  # the answer was lost, say
    await worker.tells(early)  # by the worker's clock, which is not ours

    assert again == saved
    found = [(e.type, e.attempt, e.data) for e in (await registry.jobs.events(job)).items if e.type != "state"]
    assert found == [("checkpoint", 1, {"step": 10, "size": 5}), ("progress", 1, early.data)]


async def test_a_superseded_attempt_saves_none(registry: AsyncClient):
    job = await tune(registry)
    await Worker.takes(registry, job)
    await Worker.takes(registry, job)
    with pytest.raises(errors.StaleAttempt, match="attempt 2 took over"):
        await registry.jobs.save_checkpoint(job, 1, 10, b"state")
    assert (await Worker.takes(registry, job)).checkpoints == []


@pytest.mark.parametrize("fresh", [False, True])
async def test_a_retry_goes_on_from_the_checkpoint_unless_it_is_fresh(registry: AsyncClient, fresh: bool):
    job = await tune(registry)
    worker = await Worker.takes(registry, job)
    await registry.jobs.save_checkpoint(job, 1, 10, b"state")
    await worker.fails("nan-loss", "diverged at step 11")
    await job.retry(fresh=fresh)
    second = await Worker.takes(registry, job)

    assert second.number == 2
    assert [c.step for c in second.checkpoints] == ([] if fresh else [10])


async def test_success_leaves_no_checkpoint(registry: AsyncClient):
    job = await tune(registry)
    worker = await Worker.takes(registry, job)
    saved = await registry.jobs.save_checkpoint(job, 1, 10, b"state")
    await worker.succeeds(tuned(1))

    with pytest.raises(errors.NotFound, match="keeps no checkpoint"):
        await worker.reads(saved)


async def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_there(registry: AsyncClient, settings: Settings):
    job = await tune(registry)
    await Worker.takes(registry, job)
    for step in (10, 20):
        await registry.jobs.save_checkpoint(job, 1, step, f"state after {step}".encode())
    second = await Worker.takes(registry, job)
    newest, before = second.checkpoints
    assert settings.blob_directory
    name = newest.digest.removeprefix("sha256:")
    (settings.blob_directory / "scratch" / name[:2] / name[2:]).write_bytes(b"something else")

    with pytest.raises(errors.DamagedContent):
        await second.reads(newest)
    assert await second.reads(before) == b"state after 10"


async def test_an_attempt_that_came_on_is_not_lost_in_a_row(
    registry: AsyncClient, settings: Settings, queue_tables: QueueTables
):
    job = await tune(registry)
    for attempt in range(1, settings.retry_limit + 2):
        queue_tables.take(silent_for=31)
        await Worker.takes(registry, job)
        await registry.jobs.save_checkpoint(job, attempt, 10 * attempt, b"state")
        await look_for_lost_jobs(settings)
        assert (await job.refresh()).state == "queued"
