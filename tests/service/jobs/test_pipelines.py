"""Jobs that need others, and those that are submitted for them."""

from __future__ import annotations

from uuid import uuid4

import pytest
from tests.service.jobs.conftest import ROWS, QueueTables, Worker, transfer, tune, tuned

from tpv import AsyncClient, errors
from tpv.schemas.jobs import Job
from tpv_service.db import create_engine, create_sessionmaker
from tpv_service.jobs.retry import retry_job
from tpv_service.queue import Queue
from tpv_service.settings import Settings

pytestmark = pytest.mark.anyio


@pytest.fixture
async def registry(registry: AsyncClient) -> AsyncClient:
    """Also the data sets `mr` and `subj`, of which no vectors are there."""
    await registry.datasets.upload("mr", ROWS)
    await registry.datasets.upload("subj", ROWS[:6])
    return registry


async def prepared(client: AsyncClient, **changes: object) -> tuple[Job, dict[str, Job]]:
    """A transfer of which target and two sources have to be tuned, and these tunings by their outputs."""
    members = {"sources": ["mr-own", "mnli", "subj-own"], "prepare": {"mr-own": "mr", "subj-own": "subj"}, **changes}
    job = await transfer(client, **members)
    return job, {str(made.output).removeprefix("default/"): await client.jobs.get(made.id) for made in job.needed}


async def succeeds(client: AsyncClient, job: Job, change: float = 1) -> None:
    await (await Worker.takes(client, job)).succeeds(tuned(change))


# --- Needs


async def test_a_job_starts_when_all_that_it_needs_has_succeeded(registry: AsyncClient, queue_tables: QueueTables):
    one, two = await tune(registry, "one"), await tune(registry, "two")
    job = await tune(registry, "three", needs=[two, one.id, one.id])
    assert (job.state, job.reason, job.needs) == ("queued", "waiting", [one.id, two.id])
    for needed in (two, one):
        assert str(job.id) not in queue_tables.entries()
        await succeeds(registry, needed)
    await job.refresh()

    assert queue_tables.entries()[str(job.id)] == ["todo"]
    assert [(n.output, n.state) for n in job.needed] == [("default/one", "succeeded"), ("default/two", "succeeded")]
    assert (await tune(registry, "four", needs=[one])).reason is None  # has succeeded already


async def test_what_cannot_come_is_not_waited_for(registry: AsyncClient):
    failed = await tune(registry, "one")
    await (await Worker.takes(registry, failed)).fails()
    with pytest.raises(errors.Conflict, match=f"is failed; retry it first: tpv job retry {failed.id}"):
        await tune(registry, "two", needs=[failed])
    with pytest.raises(errors.NotFound, match="which `needs` names"):
        await tune(registry, "two", needs=[uuid4()])


async def test_a_failure_goes_down_the_chain_and_a_retry_too(registry: AsyncClient):
    one = await tune(registry, "one")
    two = await tune(registry, "two", needs=[one])
    three = await tune(registry, "three", needs=[two])
    await (await Worker.takes(registry, one)).fails("data", "no such column")
    for job in (two, three):
        assert ((await job.refresh()).state, job.reason) == ("failed", "dependency")
        assert "no such column" in str(job.message)
    await one.retry()

    assert [(await job.refresh()).reason for job in (two, three)] == ["waiting", "waiting"]


async def test_a_dependent_with_another_failed_need_stays_failed(registry: AsyncClient):
    one, two = await tune(registry, "one"), await tune(registry, "two")
    job = await tune(registry, "three", needs=[one, two])
    for needed in (one, two):
        await needed.cancel()
    await one.retry()
    assert (await job.refresh()).state == "failed"
    await two.retry()
    assert (await job.refresh()).reason == "waiting"


# --- Prepare


async def test_missing_sources_are_tuned_first(registry: AsyncClient, queue_tables: QueueTables):
    job, tunings = await prepared(registry, shots=4, seed=3, target_options={"steps": 9}, task_type="nli")

    assert (job.state, job.reason) == ("queued", "waiting")
    assert set(tunings) == {"cr-own", "mr-own", "subj-own"}
    assert [source.reference for source in job.spec.sources] == ["default/mnli:1"]
    for name, tuning in tunings.items():
        spec = tuning.spec
        assert (spec.method, spec.options["steps"], spec.seed, spec.sources) == ("prompt-tuning", 9, 3, [])
        assert (spec.shots, spec.task_type) == ((4, "nli") if name == "cr-own" else (None, None))
        assert spec.dataset is not None
        assert spec.dataset.reference == f"default/{name.removesuffix('-own')}:1"
    for change, name in enumerate(("subj-own", "cr-own", "mr-own")):
        assert str(job.id) not in queue_tables.entries()
        await succeeds(registry, tunings[name], change + 1)
    await job.refresh()

    assert queue_tables.entries()[str(job.id)] == ["todo"]
    assert [s.reference for s in job.spec.sources] == ["default/mr-own:1", "default/mnli:1", "default/subj-own:1"]
    assert job.spec.target is not None
    assert job.spec.unmade_sources == {}
    await succeeds(registry, job, 9)
    made = await registry.vectors.get("cr-dtvg")
    assert [parent.reference for parent in made.parents] == [
        "default/cr-own:1",
        "default/mr-own:1",
        "default/mnli:1",
        "default/subj-own:1",
    ]


async def test_a_source_that_is_there_is_not_tuned_again(registry: AsyncClient):
    job, tunings = await prepared(registry, sources=["mnli", "mr-own"], prepare={"mnli": "cr", "mr-own": "mr"})
    assert set(tunings) == {"cr-own", "mr-own"}
    assert [source.reference for source in job.spec.sources] == ["default/mnli:1"]


async def test_tunings_on_their_way_are_shared(registry: AsyncClient):
    (one, first), (two, second) = await prepared(registry), await prepared(registry, output="other")
    assert {t.id for t in first.values()} == {t.id for t in second.values()}

    await one.cancel()  # they are still needed
    assert {(await tuning.refresh()).state for tuning in first.values()} == {"queued"}
    await two.cancel()
    assert {(await tuning.refresh()).state for tuning in first.values()} == {"cancelled"}


async def test_cancelling_takes_along_what_was_submitted_for_it_alone(registry: AsyncClient, queue_tables: QueueTables):
    asked_for = await tune(registry, "mine")
    job, tunings = await prepared(registry, needs=[asked_for])
    await succeeds(registry, tunings["mr-own"])
    await Worker.takes(registry, tunings["subj-own"])
    await job.cancel()

    assert job.message == "cancelled by local"
    states = {name: (await tuning.refresh()).state for name, tuning in tunings.items() if name != "mine"}
    assert states == {"mr-own": "succeeded", "subj-own": "cancelled", "cr-own": "cancelled"}
    assert (await asked_for.refresh()).state == "queued"
    assert (await tunings["cr-own"].refresh()).message == f"cancelled with job {job.id}, which alone needed it"


async def test_cancelling_takes_along_what_is_left_of_a_job_that_failed(
    registry: AsyncClient, queue_tables: QueueTables
):
    job, tunings = await prepared(registry)
    await (await Worker.takes(registry, tunings["mr-own"])).fails()
    await job.cancel()

    assert (job.state, job.reason) == ("failed", "dependency")
    states = {name: (await tuning.refresh()).state for name, tuning in tunings.items()}
    assert states == {"mr-own": "failed", "subj-own": "cancelled", "cr-own": "cancelled"}
    with pytest.raises(errors.JobFinished):
        await job.cancel()


async def test_cancelling_a_job_that_failed_leaves_alone_what_another_one_needs(registry: AsyncClient):
    job, tunings = await prepared(registry)
    await prepared(registry, sources=["mnli", "subj-own"], prepare={"subj-own": "subj"}, output="other")
    await (await Worker.takes(registry, tunings["mr-own"])).fails()
    with pytest.raises(errors.JobFinished):
        await job.cancel()
    assert (await tunings["subj-own"].refresh()).state == "queued"


async def test_a_retry_takes_up_what_was_made_meanwhile(registry: AsyncClient, queue_tables: QueueTables):
    job, tunings = await prepared(registry)
    await (await Worker.takes(registry, tunings["mr-own"])).fails()
    await succeeds(registry, tunings["subj-own"], 2)
    await succeeds(registry, tunings["cr-own"], 3)
    assert (await job.refresh()).reason == "dependency"
    await tunings["mr-own"].retry()
    await succeeds(registry, tunings["mr-own"], 4)
    await job.refresh()

    assert [s.reference for s in job.spec.sources] == ["default/mr-own:1", "default/mnli:1", "default/subj-own:1"]
    assert job.spec.target is not None
    assert queue_tables.entries()[str(job.id)] == ["todo"]


@pytest.mark.parametrize("end", ["succeeds", "fails"])
async def test_nothing_that_ends_during_a_retry_is_passed_over(
    registry: AsyncClient, settings: Settings, queue_tables: QueueTables, end: str
):
    job, tunings = await prepared(registry)
    mr, subj, own = (tunings[name] for name in ("mr-own", "subj-own", "cr-own"))
    await succeeds(registry, own, 2)
    await (await Worker.takes(registry, mr)).fails()
    engine, queue = create_engine(settings), Queue(settings)
    async with queue.opened(), create_sessionmaker(engine).begin() as session:
        await retry_job(session, queue, mr.id, "local", fresh=False)
        await (succeeds(registry, subj, 3) if end == "succeeds" else (await Worker.takes(registry, subj)).fails())
    await engine.dispose()
    await succeeds(registry, mr, 4)
    await job.refresh()

    if end == "succeeds":
        assert [s.reference for s in job.spec.sources] == ["default/mr-own:1", "default/mnli:1", "default/subj-own:1"]
        assert queue_tables.entries()[str(job.id)] == ["todo"]
    else:
        assert (job.state, job.reason) == ("failed", "dependency")
        assert str(subj.id) in str(job.message)


async def test_a_retry_takes_up_what_was_submitted_for_it(registry: AsyncClient, queue_tables: QueueTables):
    job, tunings = await prepared(registry)
    await succeeds(registry, tunings["mr-own"], 1)
    await job.cancel()
    await job.retry()

    assert (job.state, job.reason) == ("queued", "waiting")
    assert {name: (await tuning.refresh()).state for name, tuning in tunings.items()} == {
        "mr-own": "succeeded",
        "subj-own": "queued",
        "cr-own": "queued",
    }
    await succeeds(registry, tunings["subj-own"], 2)
    await (await Worker.takes(registry, tunings["cr-own"])).fails()
    assert (await job.refresh()).reason == "dependency"
    await job.retry(fresh=True)
    assert (job.state, job.reason, job.finished_at) == ("queued", "waiting", None)
    await succeeds(registry, tunings["cr-own"], 3)
    assert queue_tables.entries()[str(job.id)] == ["todo"]


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"prepare": {"mr-own": "mr"}}, errors.NotFound, "no vector subj-own"),
        ({"prepare": {"mr-own": "mr", "subj-own": "subj", "x": "mr"}}, errors.Invalid, "names default/x, which is no"),
        ({"prepare": {"mr-own": "mr", "subj-own": "gone"}}, errors.NotFound, "no data set gone"),
        ({"sources": ["mr-own"], "prepare": {"mr-own": "mr"}}, errors.Invalid, "name the `initialization`"),
        ({"sources": ["mr-own:1"], "prepare": {"mr-own": "mr"}}, errors.NotFound, "no vector mr-own:1"),
        ({"target": "mr-own"}, errors.Invalid, "cannot be a source of itself"),
    ],
)
async def test_what_cannot_be_prepared_is_refused_at_once(
    registry: AsyncClient, queue_tables: QueueTables, changes: dict, error: type[errors.ProblemError], text: str
):
    with pytest.raises(error, match=text):
        await prepared(registry, **changes)
    assert queue_tables.entries() == {}
