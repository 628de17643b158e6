"""What jobs leave behind goes when nobody can ask for it any more, and nothing else does."""

from __future__ import annotations

from datetime import timedelta

import pytest
from tests.service.jobs.conftest import QueueTables, Worker, figure, silent, there, tune, tuned

from tpv import AsyncClient, errors, files
from tpv.schemas.jobs import ResultReport
from tpv_service.db import create_engine, create_sessionmaker
from tpv_service.jobs.forget import FILES_KEPT, forget_what_is_over
from tpv_service.queue import Queue
from tpv_service.settings import Settings
from tpv_service.storage import create_scratch, create_store

pytestmark = pytest.mark.anyio


async def forget(settings: Settings, kept: timedelta = FILES_KEPT) -> set[str]:
    """What the service does every ten minutes; gives the files that are left."""
    engine, queue, scratch = create_engine(settings), Queue(settings), create_scratch(settings)
    async with queue.opened():
        await forget_what_is_over(create_sessionmaker(engine), queue, scratch, kept)
    await engine.dispose()
    return {*scratch.digests()}


async def test_what_is_over_for_long_is_forgotten(registry: AsyncClient, settings: Settings, queue_tables: QueueTables):
    ended, waiting = await tune(registry), await tune(registry, "other")
    await registry.jobs.cancel(ended)
    await there(registry, "old")
    await forget(settings)
    assert set(queue_tables.entries()) == {str(ended.id), str(waiting.id)}
    assert [worker.name async for worker in registry.workers.list()] == ["old"]

    queue_tables.age(hours=25)
    await silent(settings, timedelta(days=8).total_seconds())
    await there(registry, "new")
    await forget(settings)
    assert set(queue_tables.entries()) == {str(waiting.id)}
    assert [worker.name async for worker in registry.workers.list()] == ["new"]
    assert (await registry.jobs.get(ended)).state == "cancelled"
    assert (await registry.jobs.retry(ended)).state == "queued"


async def test_files_are_kept_as_long_as_an_attempt_may_ask_for_them(registry: AsyncClient, settings: Settings):
    now = timedelta(seconds=-1)
    job = await tune(registry)
    first = await Worker.takes(registry, job)
    saved = [await registry.jobs.save_checkpoint(job, 1, step, f"state {step}".encode()) for step in (10, 20, 30)]
    dropped, *checkpoints = [checkpoint.digest for checkpoint in saved]
    staged = await first.stages(tuned(1))
    assert await forget(settings) == {dropped, *checkpoints, staged}  # too young to be looked at
    assert await forget(settings, now) == {*checkpoints, staged}

    await first.fails("killed")
    assert await forget(settings, now) == {*checkpoints}
    second = await Worker.takes(registry, job)
    assert [await second.reads(checkpoint) for checkpoint in second.checkpoints] == [b"state 30", b"state 20"]
    await second.succeeds(tuned(1))
    assert await forget(settings, now) == set()


async def test_what_a_result_is_made_of_is_kept_for_good(registry: AsyncClient, settings: Settings):
    tuning = await tune(registry)
    worker = await Worker.takes(registry, tuning)
    predictions = await registry.jobs.stage(tuning, 1, b"{}")
    state = await registry.jobs.stage(tuning, 1, files.dump({"alpha": tuned(1)}))
    await worker.succeeds(tuned(1), state=state.digest, evaluations=[figure(0.5, predictions.digest)])
    lora = await registry.jobs.tune(method="lora", dataset="cr", initialization="family")
    await Worker.takes(registry, lora)
    artifact = await registry.jobs.stage(lora, 1, files.dump({"A": tuned(2)}))
    await registry.jobs.complete(lora, 1, ResultReport(artifact=artifact.digest))

    assert await forget(settings, timedelta(seconds=-1)) == set()
    assert {predictions.digest, state.digest, artifact.digest} <= {*create_store(settings).digests()}


async def test_a_staged_file_is_gone_with_its_attempt(registry: AsyncClient, settings: Settings):
    job = await tune(registry)
    worker = await Worker.takes(registry, job)
    staged = await worker.stages(tuned(1))
    await worker.fails()
    await forget(settings, timedelta(seconds=-1))
    with pytest.raises(errors.NotFound, match="has not staged"):
        await registry.jobs.staged(job, 1, staged)
