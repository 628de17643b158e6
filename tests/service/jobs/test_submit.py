from __future__ import annotations

import numpy as np
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine
from tests.service.jobs.conftest import ROWS, START, QueueTables, Worker, transfer, tune, tuned

from tpv import AsyncClient, errors
from tpv.methods import METHODS, DtvgOptions, PromptTuningOptions
from tpv.presets import preset_options
from tpv.schemas.jobs import JobCreate
from tpv_service.db import create_engine, create_sessionmaker
from tpv_service.jobs.submit import resolve_job, submit_job
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
        resolved = await resolve_job(None, session, request)  # only a reference pool needs the application
        await submit_job(session, Queue(settings), request, *resolved, "nobody")
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
        ({"method": "tuning"}, errors.InvalidOptions, "no method 'tuning'; use one of initialize, prompt-tuning, spot"),
        ({"method": "initialize", "base_model": {"id": "t5-base"}}, errors.Invalid, "needs a revision"),
        (
            {"options": {"step": 3}},
            errors.InvalidOptions,
            r"options\.step: Extra inputs are not permitted; the options of prompt-tuning are .*steps",
        ),
        ({"options": {"steps": 0}}, errors.InvalidOptions, r"options\.steps: .*greater"),
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


async def test_every_method_takes_what_its_entry_says(registry: AsyncClient):
    """All of it is needed, and anything else is refused."""
    await registry.datasets.upload("mr", ROWS)
    tuning = {"initialization": "family", "dataset": "cr"}
    sources = {"sources": ["mnli", "qnli"], "dataset": "cr"}
    needed = {
        "initialize": {"base_model": {"id": "/m"}},
        "prompt-tuning": {**tuning, "output": "new"},
        "spot": {**sources, "target": "cr-own", "output": "new"},
        "spot-multitask": {**tuning, "datasets": ["mr"], "output": "both"},
        "tpv-sum": {**sources, "output": "new"},
        "dtvg": {**sources, "target": "cr-own", "output": "new"},
        "attempt": sources,
        "mpt": {**sources, "datasets": ["mr", "mr"], "output": "new"},
        "dept": tuning,
        "lora": tuning,
        "full": tuning,
    }
    vector = {"output": "new", "task_type": "nli"}
    training = {"preset": "dtvg-paper", "shots": 3, "shot_seed": 1}
    refused = {
        "initialize": {**training, **tuning, "datasets": ["mr"], "target": "t", "sources": ["mnli"], "task_type": "t"},
        "prompt-tuning": {"datasets": ["mr"], "sources": ["mnli"], "target": "t", "target_options": {"steps": 1}},
        "spot": {"datasets": ["mr"], "reference_pool": {}, "base_model": {"id": "/m"}},
        "spot-multitask": {"sources": ["mnli"], "target": "t"},
        "tpv-sum": {"datasets": ["mr"], "target": "t", "target_options": {"steps": 1}},
        "dtvg": {"datasets": ["mr"]},
        "attempt": {"target": "t", **vector},
        "mpt": {"target": "t"},
        "dept": {"datasets": ["mr"], **vector},
        "lora": vector,
        "full": vector,
    }
    assert set(needed) == set(refused) == set(METHODS)
    for method, members in needed.items():
        made = await registry.jobs.submit(JobCreate.model_validate({"method": method, **members}))
        assert (made.method, made.output is None) == (method, "output" not in members)
        for member in members:
            less = {name: value for name, value in members.items() if name != member}
            with pytest.raises(errors.Invalid, match=f"a job of the method {method} needs {member}"):
                await registry.jobs.submit(JobCreate.model_validate({"method": method, **less}))
        for member, value in refused[method].items():
            if member not in members:
                with pytest.raises(errors.Invalid, match=f"a job of the method {method} takes no {member}"):
                    await registry.jobs.submit(JobCreate.model_validate({"method": method, **members, member: value}))


async def test_each_source_has_one_data_set(registry: AsyncClient):
    await registry.datasets.upload("mr", ROWS)
    members = {"method": "mpt", "target": None, "steps": 2}
    with pytest.raises(errors.Invalid, match="there are 2 sources and 1 data sets"):
        await transfer(registry, **members, datasets=["mr"])
    job = await transfer(registry, **members, datasets=["mr", "cr"], shots=4)  # a source may have less than the shots

    assert [dataset.reference for dataset in job.spec.datasets] == ["default/mr:1", "default/cr:1"]
    assert (job.spec.target, job.spec.target_name) == (None, None)


async def test_tasks_that_are_trained_together_are_all_named_by_the_result(registry: AsyncClient):
    await registry.datasets.upload("mr", ROWS[:3])
    with pytest.raises(errors.Invalid, match="a data set is named twice: cr"):
        await tune(registry, method="spot-multitask", datasets=["cr:1"])
    with pytest.raises(errors.InvalidDataset, match="mr has 3 rows in the split train; 4 needed"):
        await tune(registry, method="spot-multitask", datasets=["mr"], shots=4)
    with pytest.raises(errors.Conflict, match="mnli is of task mnli, the job's is cr, mr"):
        await tune(registry, "mnli", method="spot-multitask", datasets=["mr"])
    for dataset, further in (("mr", "cr"), ("cr", "mr")):  # in whatever order
        job = await tune(registry, "both", method="spot-multitask", dataset=dataset, datasets=[further])
        await (await Worker.takes(registry, job)).succeeds(tuned(1))

    assert (await registry.vectors.describe("both")).tasks == ["cr", "mr"]
    assert (await registry.vectors.get("both")).provenance["datasets"] == ["default/cr:1"]


# --- Presets


@pytest.fixture
async def base_size(registry: AsyncClient) -> AsyncClient:
    """Also `base`, an initialization of a T5 as wide as T5-base, with the source `sst2`."""
    start = np.zeros((2, 768), dtype=np.float32)
    facts = {"architecture": "T5ForConditionalGeneration", "token_dim": 768}
    model = {"base_model": "/models/base", "unpinned": True, "base_model_facts": facts}
    await registry.initializations.create("base", tensor=start, **model)
    await registry.vectors.register("sst2", vector=start + 1, initialization="base", task="sst2")
    return registry


async def test_a_preset_gives_the_options_that_are_left_out(base_size: AsyncClient):
    members = {"sources": ["sst2"], "preset": "dtvg-paper", "shots": 4}
    job = await transfer(base_size, **members, batch_size=7)
    [first] = [await base_size.jobs.get(need) for need in job.needs]
    other = await transfer(base_size, **members, output="other", target_options={"steps": 9})
    [own] = [await base_size.jobs.get(need) for need in other.needs]

    assert job.spec.preset == first.spec.preset == "dtvg-paper"
    expected = preset_options("dtvg-paper", "dtvg", "T5ForConditionalGeneration", 768, train_rows=4, few_shot=True)
    assert job.spec.options == DtvgOptions(**expected | {"batch_size": 7}).model_dump(mode="json")
    expected = preset_options("dtvg-paper", "prompt-tuning", "T5ForConditionalGeneration", 768, few_shot=True)
    assert first.spec.options == PromptTuningOptions(**expected).model_dump(mode="json")
    assert own.spec.options == first.spec.options | {"steps": 9}
    assert job.spec.options["strategy"] == "prefix" != DtvgOptions().strategy


async def test_a_preset_knows_the_rows_that_are_trained_on(base_size: AsyncClient):
    await base_size.datasets.upload("mr", ROWS * 20)
    members = {"method": "spot-multitask", "datasets": ["mr"], "initialization": "base", "preset": "tpv-paper"}
    job = await base_size.jobs.tune(dataset="cr", output="both", **members)

    assert job.spec.options["steps"] == 10 * 6  # ten epochs of 168 rows in batches of 32


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"preset": "our-paper"}, "preset: there is no preset 'our-paper'; use one of dtvg-paper, tpv-paper"),
        ({"initialization": "family"}, "preset: dtvg-paper has no figures for a model that is not known yet"),
        ({"method": "full"}, "preset: dtvg-paper has no figures for full on T5-base"),
    ],
)
async def test_a_preset_that_has_no_figures_is_refused(base_size: AsyncClient, changes: dict, text: str):
    members = {"method": "prompt-tuning", "initialization": "base", "dataset": "cr", "preset": "dtvg-paper"} | changes
    output = None if members["method"] == "full" else "new"
    with pytest.raises(errors.InvalidOptions, match=text):
        await base_size.jobs.submit(JobCreate.model_validate(members | {"output": output}))


# --- Centring


async def neighbours(registry: AsyncClient, count: int) -> None:
    for i in range(count):
        await registry.vectors.register(f"s{i}", prompt=tuned(i + 1), initialization="family", task=f"s{i}")


async def test_a_centre_is_the_mean_of_the_family_without_the_targets_task(registry: AsyncClient):
    await neighbours(registry, 9)
    names = ["mnli", "qnli", *(f"s{i}" for i in range(9))]
    expected = np.mean(
        [(await (await registry.vectors.get(name)).load()).tensor.mean(axis=0) for name in names], axis=0
    )
    await registry.vectors.register("cr-old", prompt=tuned(50), initialization="family", task="cr")
    waiting = await transfer(registry, center=True)  # its target has no vector yet
    await registry.vectors.register("cr-own", prompt=tuned(40), initialization="family", task="cr")
    job = await transfer(registry, center=True, output="other")
    named = await transfer(registry, center=True, reference_pool=[*names[1:], "cr-own", "cr-old"])

    for centre in (waiting.spec.center, job.spec.center):
        assert np.allclose(centre.vector, expected, atol=1e-6)
        assert (centre.size, centre.rule) == (11, "the newest not deleted version of each vector of the initialization")
    assert (named.spec.center.size, named.spec.center.rule) == (10, "the references given")
    assert not np.allclose(named.spec.center.vector, expected, atol=1e-6)
    assert (await registry.jobs.get(waiting.needs[0])).spec.center is None
    assert (await transfer(registry, output="plain")).spec.center is None


async def test_a_small_reference_pool_is_refused(registry: AsyncClient, queue_tables: QueueTables):
    await neighbours(registry, 7)
    with pytest.raises(errors.Invalid, match="center: the reference pool has 9 vectors without the query, at least 10"):
        await transfer(registry, center=True)
    with pytest.raises(errors.Invalid, match="reference_pool belongs to the option `center`, which is off"):
        await transfer(registry, reference_pool=["mnli"])
    assert queue_tables.entries() == {}


# --- Initializations and targets


async def test_vectors_of_different_initializations_are_not_mixed(registry: AsyncClient):
    other = (START + np.float32(1)).astype(np.float32)
    await registry.initializations.create("other", base_model="/models/t5", unpinned=True, tensor=other)
    await registry.vectors.register("sst2", prompt=other * 2, initialization="other", task="sst2")

    with pytest.raises(errors.IncompatibleVectors, match="differ in fingerprint") as caught:
        await transfer(registry, sources=["mnli", "sst2"])
    assert set(caught.value.extra["differences"]) == {"fingerprint"}
    with pytest.raises(errors.IncompatibleVectors, match="the one asked for default/other"):
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
