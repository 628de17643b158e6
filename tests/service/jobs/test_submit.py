from __future__ import annotations

import numpy as np
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine
from tests.service.jobs.conftest import ROWS, START, QueueTables, Worker, transfer, tune, tuned

from tpv import AsyncClient, errors
from tpv.methods import PromptTuningOptions
from tpv.schemas.jobs import JobCreate
from tpv_service.db import create_engine, create_sessionmaker
from tpv_service.jobs.submit import submit_job
from tpv_service.queue import Queue
from tpv_service.settings import Settings

pytestmark = pytest.mark.anyio


async def test_a_job_holds_resolved_things_and_complete_options(registry: AsyncClient, queue_tables: QueueTables):
    await registry.vectors.set_alias("mnli", "best", 1)
    own = await tune(registry)
    await (await Worker.takes(registry, own)).succeeds(tuned(1))
    job = await transfer(registry, sources=["mnli@best", "qnli"], steps=7)

    assert job.state == "queued"
    assert job.actor == "local"
    assert job.output == job.spec.output == "default/cr-dtvg"
    assert [source.reference for source in job.spec.sources] == ["default/mnli:1", "default/qnli:1"]
    assert job.spec.target is not None
    assert job.spec.target.reference == "default/cr-own:1"
    assert job.spec.dataset is not None
    assert job.spec.dataset.reference == "default/cr:1"
    assert job.spec.initialization is not None
    assert job.spec.initialization.reference == "default/family"
    assert job.spec.base_model.id == "/models/t5"
    assert job.spec.options["steps"] == 7
    assert job.spec.options["batch_size"] == PromptTuningOptions().batch_size
    assert queue_tables.entries()[str(job.id)] == ["todo"]


async def test_jobs_are_listed_newest_first_and_filtered(registry: AsyncClient):
    first, second = await tune(registry, "one"), await tune(registry, "two")
    await registry.jobs.cancel(first)

    assert [job.id async for job in registry.jobs.list(page_size=1)] == [second.id, first.id]
    assert [job.id async for job in registry.jobs.list(output="one")] == [first.id]
    assert [job.id async for job in registry.jobs.list(state="queued", method="prompt-tuning")] == [second.id]
    assert [job.id async for job in registry.jobs.list(method="dtvg")] == []


async def test_a_rollback_takes_the_queued_job_away(
    registry: AsyncClient, settings: Settings, queue_tables: QueueTables
):
    engine: AsyncEngine = create_engine(settings)
    request = JobCreate(method="prompt-tuning", initialization="family", dataset="cr", output="lost")
    async with create_sessionmaker(engine)() as session:
        await submit_job(session, Queue(settings), request, "nobody")
        await session.rollback()
    await engine.dispose()

    assert queue_tables.entries() == {}
    assert [job async for job in registry.jobs.list()] == []


async def test_the_same_key_submits_one_job(registry: AsyncClient, http, queue_tables: QueueTables):
    body = {"method": "prompt-tuning", "initialization": "family", "dataset": "cr", "output": "once"}
    answers = [await http.post("/api/v1/jobs", json=body, headers={"Idempotency-Key": "k"}) for _ in range(2)]

    assert [answer.status_code for answer in answers] == [201, 201]
    assert answers[0].json() == answers[1].json()
    assert len(queue_tables.entries()) == 1


@pytest.mark.parametrize(
    ("request_", "error", "text"),
    [
        ({"method": "tuning"}, errors.InvalidOptions, "no method 'tuning'; use one of initialize, prompt-tuning, dtvg"),
        ({"method": "initialize"}, errors.Invalid, "a initialize job needs base_model"),
        ({"method": "initialize", "base_model": {"id": "t5-base"}}, errors.Invalid, "needs a revision"),
        (
            {"method": "initialize", "base_model": {"id": "/m"}, "dataset": "cr", "shots": 3},
            errors.Invalid,
            "takes no dataset, shots",
        ),
        ({"method": "prompt-tuning", "dataset": "cr"}, errors.Invalid, "needs initialization, output"),
        (
            {"method": "prompt-tuning", "options": {"step": 3}},
            errors.InvalidOptions,
            r"options\.step: Extra inputs are not permitted; the options of prompt-tuning are .*steps",
        ),
        ({"method": "prompt-tuning", "options": {"steps": 0}}, errors.InvalidOptions, r"options\.steps: .*greater"),
        ({"initialization": "other"}, errors.NotFound, "no initialization other"),
        ({"dataset": "other"}, errors.NotFound, "no data set other"),
        ({"output": "cr:3"}, errors.InvalidReference, "its version is made by the job"),
        ({"shots": 9}, errors.InvalidDataset, "has 8 rows in the split train; 9 needed"),
        ({"output": "mnli"}, errors.Conflict, "is of task mnli, the job's is cr"),
    ],
)
async def test_what_cannot_be_done_is_refused_at_once(
    registry: AsyncClient, queue_tables: QueueTables, request_: dict, error: type[errors.ProblemError], text: str
):
    complete = {"method": "prompt-tuning", "initialization": "family", "dataset": "cr", "output": "new"}
    request = request_ if "method" in request_ else complete | request_
    with pytest.raises(error, match=text):
        await registry.jobs.submit(JobCreate.model_validate(request))
    assert queue_tables.entries() == {}


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"output": "cr-own"}, errors.Invalid, "the result needs a name of its own"),
        ({"target": "cr-own:1"}, errors.NotFound, "no vector cr-own:1"),
        ({"sources": ["mnli", "mnli:1"]}, errors.Invalid, "named twice: default/mnli:1"),
        ({"target": "mnli"}, errors.Invalid, "cannot be a source of itself"),
        ({"sources": ["mnli", "gone"]}, errors.NotFound, "no vector gone"),
        ({"target_options": {"step": 1}}, errors.InvalidOptions, r"target_options\.step"),
        ({"target": "sst2"}, errors.Conflict, "sst2 was deleted"),
    ],
)
async def test_transfers_that_make_no_sense_are_refused_at_once(
    registry: AsyncClient, queue_tables: QueueTables, changes: dict, error: type[errors.ProblemError], text: str
):
    await registry.vectors.register("sst2", prompt=tuned(2), initialization="family", task="cr")
    await registry.vectors.delete("sst2")
    with pytest.raises(error, match=text):
        await transfer(registry, **changes)
    assert queue_tables.entries() == {}


async def test_vectors_of_different_initializations_are_not_mixed(registry: AsyncClient):
    other = (START + np.float32(1)).astype(np.float32)
    await registry.initializations.create("other", base_model="/models/t5", unpinned=True, tensor=other)
    await registry.vectors.register("sst2", prompt=other * 2, initialization="other", task="sst2")

    with pytest.raises(errors.IncompatibleVectors, match="differ in fingerprint") as caught:
        await transfer(registry, sources=["mnli", "sst2"])
    assert set(caught.value.extra["differences"]) == {"fingerprint"}
    with pytest.raises(errors.IncompatibleVectors, match="the one asked for other"):
        await transfer(registry, initialization="other")


async def test_the_targets_own_tuning_comes_first_when_it_is_missing(registry: AsyncClient, queue_tables: QueueTables):
    job = await transfer(registry, shots=4, shot_seed=2, seed=3, target_options={"steps": 9})

    assert (job.state, job.reason) == ("queued", "waiting")
    assert job.spec.target is None
    assert job.spec.target_name == "default/cr-own"
    [first] = [await registry.jobs.get(need) for need in job.needs]
    assert (first.method, first.output, first.state) == ("prompt-tuning", "default/cr-own", "queued")
    assert (first.spec.shots, first.spec.shot_seed, first.spec.seed) == (4, 2, 3)
    assert first.spec.options["steps"] == 9
    assert first.spec.initialization == job.spec.initialization
    assert queue_tables.entries() == {str(first.id): ["todo"]}


async def test_transfers_share_the_targets_tuning_that_is_on_its_way(registry: AsyncClient):
    one, two = await transfer(registry, output="one"), await transfer(registry, output="two")
    other = await transfer(registry, output="three", seed=1)

    assert one.needs == two.needs
    assert other.needs != one.needs


async def test_rows_of_another_data_set_are_another_task(registry: AsyncClient):
    await registry.datasets.upload("lab/cr", ROWS)
    job = await tune(registry, dataset="lab/cr")
    await (await Worker.takes(registry, job)).succeeds(tuned(1))

    assert (await registry.vectors.describe("cr-own")).tasks == ["lab/cr"]
