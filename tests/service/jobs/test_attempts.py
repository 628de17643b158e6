"""What workers report, what users then see, and what happens when a worker is not what it was."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from uuid import uuid4

import numpy as np
import pytest
from pydantic import SecretStr
from structlog.testing import capture_logs
from tests.service.jobs.conftest import (
    START,
    QueueTables,
    Worker,
    event,
    figure,
    look_for_lost_jobs,
    transfer,
    tune,
    tuned,
)

from tpv import AsyncClient, errors, files
from tpv.schemas.initializations import BaseModelFacts
from tpv.schemas.jobs import Job, ResultReport
from tpv_service.db import create_engine, create_sessionmaker
from tpv_service.jobs.stalled import watch_stalled_jobs
from tpv_service.queue import Queue
from tpv_service.settings import Settings
from tpv_service.storage import create_scratch

pytestmark = pytest.mark.anyio


async def states(client: AsyncClient, job: Job) -> list[str]:
    page = await client.jobs.events(job)
    return [found.data["state"] for found in page.items if found.type == "state"]


# --- The straight way


async def test_a_result_makes_the_version_its_evaluations_and_its_lineage_together(registry: AsyncClient):
    own = await tune(registry)
    await (await Worker.takes(registry, own)).succeeds(tuned(1))
    job = await transfer(registry, task_type="sentiment", description="a text", tags={"team": "a"})
    worker = await Worker.takes(registry, job, "gpu-1:7")
    predictions = await registry.jobs.stage(job, 1, b'{"prediction": "yes", "target": "no"}\n')
    state = await registry.jobs.stage(job, 1, files.dump({"alpha": START}))
    done = await worker.succeeds(
        tuned(2),
        state=state.digest,
        evaluations=[figure(0.75, predictions.digest), figure(0.5)],
        metrics={"validation/accuracy": 0.75, "target_steps": 40},
        provenance={"libraries": {"torch": "2"}},
    )

    assert (done.state, done.reason, done.result, done.result_created) == ("succeeded", None, "default/cr-dtvg:1", True)
    assert done.metrics == {"validation/accuracy": 0.75, "target_steps": 40}
    assert [(a.number, a.worker, a.state) for a in done.attempts] == [(1, "gpu-1:7", "succeeded")]
    assert done.finished_at is not None
    version = await registry.vectors.get("cr-dtvg")
    assert np.array_equal((await version.load()).tensor, tuned(2) - START)
    assert version.job == job.id
    assert version.method == "dtvg"
    assert version.hyperparameters["strategy"] == "greedy"
    assert version.dataset_fingerprint == (await registry.datasets.get("cr")).fingerprint
    assert version.provenance["libraries"] == {"torch": "2"}
    assert version.provenance["job"] == str(job.id)
    assert [(parent.reference, parent.role) for parent in version.parents] == [
        ("default/cr-own:1", "target"),
        ("default/mnli:1", "source"),
        ("default/qnli:1", "source"),
    ]
    assert [(e.value, e.job, e.predictions) for e in version.evaluations] == [
        (0.75, job.id, predictions.digest),
        (0.5, job.id, None),
    ]
    assert await registry.vectors.predictions(version.evaluations[0]) == [{"prediction": "yes", "target": "no"}]
    vector = await registry.vectors.describe("cr-dtvg")
    assert (vector.tasks, vector.task_type, vector.description, vector.tags) == (
        ["cr"],
        "sentiment",
        "a text",
        {"team": "a"},
    )
    assert await states(registry, job) == ["queued", "running", "succeeded"]


async def test_an_initialize_job_makes_an_initialization(client: AsyncClient):
    job = await client.jobs.initialize("drawn", base_model="/models/t5", num_virtual_tokens=4, seed=5)
    facts = BaseModelFacts(digest="sha256:" + "1" * 64, architecture="T5ForConditionalGeneration", token_dim=8)
    done = await (await Worker.takes(client, job)).succeeds(START, base_model_facts=facts)

    made = await client.initializations.get("drawn")
    assert done.result == str(made.id)
    assert (made.strategy, made.parameters["seed"], made.parameters["top_k"]) == ("random-vocab", 5, 5000)
    assert made.base_model.verified
    assert made.base_model.architecture == "T5ForConditionalGeneration"
    assert np.array_equal(await client.initializations.load("drawn"), START)


async def test_an_artifact_its_evaluations_and_success_appear_together(registry: AsyncClient, http, tmp_path):
    job = await tune(registry, None, method="lora", steps=2)
    worker = await Worker.takes(registry, job)
    with pytest.raises(errors.NotFound, match="has no artifact: it is a running job of lora"):
        await registry.jobs.download(job, tmp_path / "early.safetensors")
    content = files.dump({"layer.A": START, "layer.B": START[:1]}, {"method": "lora"})
    staged = await registry.jobs.stage(job, worker.number, content)
    predictions = await registry.jobs.stage(job, worker.number, b'{"prediction": "yes", "target": "no"}\n')
    report = ResultReport(
        artifact=staged.digest,
        evaluations=[figure(0.75, predictions.digest)],
        metrics={"validation/accuracy": 0.75},
        provenance={"best_step": 2},
    )
    done = await registry.jobs.complete(job, worker.number, report)
    again = await registry.jobs.complete(job, worker.number, report)

    assert done == again == await registry.jobs.get(job)
    assert (done.state, done.output, done.result) == ("succeeded", None, None)
    assert (done.artifact.digest, done.artifact.size) == (staged.digest, len(content))
    assert (done.metrics, done.provenance) == ({"validation/accuracy": 0.75}, {"best_step": 2})
    [evaluation] = done.evaluations
    assert (evaluation.value, evaluation.job, evaluation.predictions) == (0.75, job.id, predictions.digest)
    assert await registry.vectors.predictions(evaluation) == [{"prediction": "yes", "target": "no"}]
    saved = await registry.jobs.download(job.id, tmp_path / "lora.safetensors")
    assert saved.read_bytes() == content
    url = f"/api/v1/jobs/{job.id}/artifact"
    answer = await http.get(url, headers={"Range": "bytes=0-7"})
    assert (answer.status_code, answer.content, answer.headers["ETag"]) == (206, content[:8], f'"{staged.digest}"')
    assert (await http.get(url, headers={"If-None-Match": f'"{staged.digest}"'})).status_code == 304
    assert {vector.name async for vector in registry.vectors.list()} == {"mnli", "qnli"}


async def test_a_job_of_figures_alone_has_nothing_to_download(registry: AsyncClient, tmp_path):
    job = await tune(registry, None, method="full", steps=2)
    done = await registry.jobs.complete(
        job, (await Worker.takes(registry, job)).number, ResultReport(evaluations=[figure(0.5)], metrics={"loss": 1.0})
    )

    assert (done.state, done.result, done.artifact, done.metrics) == ("succeeded", None, None, {"loss": 1.0})
    assert [e.value for e in (await registry.jobs.get(job)).evaluations] == [0.5]
    with pytest.raises(errors.NotFound, match="has no artifact: it is a succeeded job of full"):
        await registry.jobs.download(job, tmp_path / "full.safetensors")


async def test_a_version_s_figures_are_its_job_s_too(registry: AsyncClient):
    job = await tune(registry)
    done = await (await Worker.takes(registry, job)).succeeds(tuned(1), evaluations=[figure(0.5)])

    assert done.evaluations == (await registry.vectors.get("cr-own")).evaluations


async def test_the_same_content_again_is_the_version_that_is_there(registry: AsyncClient):
    for created in (True, False):
        job = await tune(registry)
        done = await (await Worker.takes(registry, job)).succeeds(tuned(1))
        assert (done.result, done.result_created) == ("default/cr-own:1", created)


async def test_warnings_are_events(registry: AsyncClient):
    job = await tune(registry)
    await (await Worker.takes(registry, job)).tells(event("warning", message="the group flaps"))

    assert (await registry.jobs.events(job)).items[-1].data == {"message": "the group flaps"}


async def test_events_are_followed_and_show_where_the_job_is(registry: AsyncClient):
    job = await tune(registry)
    worker = await Worker.takes(registry, job)
    reports = [
        event("phase", message="tuning"),
        event("progress", step=10, steps=50, loss=1.5),
        event("evaluation", step=10, metric="accuracy", value=0.5, split="validation"),
        event("group", step=11, members=["default/mnli:1"], changes=2),
        event("progress", step=20, steps=50, loss=1.0),
    ]
    await worker.tells(*reports[:3])
    await worker.tells(*reports[2:])  # a report whose answer was lost comes again

    shown = (await registry.jobs.get(job)).progress
    assert (shown.step, shown.steps, shown.loss) == (20, 50, 1.0)
    assert (shown.metric, shown.value, shown.group) == ("accuracy", 0.5, ["default/mnli:1"])
    assert shown.group_changes == 2
    # 10 steps in the 3 ticks of a second between the two, in batches of 32.
    assert (shown.samples_per_second, shown.eta) == pytest.approx((320 / 3, 9.0))
    page = await registry.jobs.events(job, limit=4)
    assert [found.type for found in page.items] == ["state", "state", "phase", "progress"]
    rest = await registry.jobs.events(job, page.next_after)
    assert [(found.type, found.attempt) for found in rest.items] == [("evaluation", 1), ("group", 1), ("progress", 1)]
    assert not rest.finished


async def test_who_waits_for_events_gets_them_when_they_come(registry: AsyncClient):
    job = await tune(registry)
    seen = (await registry.jobs.events(job)).next_after
    waiting = asyncio.create_task(registry.jobs.events(job, seen, 20))
    await asyncio.sleep(0.3)
    assert not waiting.done()
    worker = await Worker.takes(registry, job)
    assert [found.data["state"] for found in (await waiting).items] == ["running"]

    await worker.fails()
    with pytest.raises(errors.JobFailed, match=r"failed \(data\): no such column"):
        await job.wait(timeout=10)
    empty = await registry.jobs.events(job, seen + 1000, 20)
    assert (empty.items, empty.finished) == ([], True)


# --- Fencing


async def test_a_new_attempt_supersedes_the_one_before(registry: AsyncClient):
    job = await tune(registry)
    first, second = await Worker.takes(registry, job, "one"), await Worker.takes(registry, job, "two")
    for report in (
        first.tells(event("log", message="still here")),
        first.stages(tuned(1)),
        first.fails(),
        registry.jobs.complete(job, 1, ResultReport(prompt="sha256:0")),
    ):
        with pytest.raises(errors.StaleAttempt, match="attempt 2 took over"):
            await report
    done = await second.succeeds(tuned(1))

    assert [(a.number, a.state, a.reason) for a in done.attempts] == [
        (1, "superseded", "worker-lost"),
        (2, "succeeded", None),
    ]


async def test_a_result_that_comes_twice_counts_once(registry: AsyncClient):
    job = await tune(registry)
    worker = await Worker.takes(registry, job)
    once = await worker.succeeds(tuned(1))
    again = await registry.jobs.complete(job, 1, ResultReport(prompt=files.digest(files.dump({"prompt": tuned(1)}))))

    assert again == once
    assert [version.version async for version in registry.vectors.versions("cr-own")] == [1]
    with pytest.raises(errors.JobFinished, match="succeeded already"):
        await Worker.takes(registry, job)
    with pytest.raises(errors.StaleAttempt, match="the job is succeeded"):
        await worker.fails()


async def test_two_results_at_once_make_one_version(registry: AsyncClient):
    job = await tune(registry)
    worker = await Worker.takes(registry, job)
    result = ResultReport(prompt=await worker.stages(tuned(1)), evaluations=[figure(0.5)])
    await asyncio.gather(*(registry.jobs.complete(job, 1, result) for _ in range(4)), return_exceptions=True)

    [version] = [version async for version in registry.vectors.versions("cr-own")]
    assert len(version.evaluations) == 1
    assert await states(registry, job) == ["queued", "running", "succeeded"]


async def test_a_result_is_made_of_what_this_attempt_has_staged(registry: AsyncClient):
    job = await tune(registry)
    first = await Worker.takes(registry, job)
    theirs = await first.stages(tuned(1))
    second = await Worker.takes(registry, job)
    with pytest.raises(errors.Invalid, match="has not staged"):
        await registry.jobs.complete(job, second.number, ResultReport(prompt=theirs))
    with pytest.raises(errors.NotFound, match="has not staged"):
        await registry.jobs.staged(job, second.number, theirs)

    assert await registry.jobs.staged(job, first.number, theirs) == files.dump({"prompt": tuned(1)})
    assert (await registry.jobs.get(job)).state == "running"


@pytest.mark.parametrize(
    ("method", "given", "text"),
    [
        ("prompt-tuning", "artifact", r"result of prompt-tuning is vector: .* one file, `prompt`, not artifact"),
        ("lora", "prompt", r"result of lora is artifact: .* one file, `artifact`, not prompt"),
        ("full", "artifact", r"result of full is metrics: .* no file, not artifact"),
        ("lora", None, r"result of lora is artifact: .* one file, `artifact`, not none"),
    ],
)
async def test_a_result_is_of_the_kind_that_its_method_gives(
    registry: AsyncClient, method: str, given: str | None, text: str
):
    job = await tune(registry, "out" if method == "prompt-tuning" else None, method=method)
    worker = await Worker.takes(registry, job)
    members = {given: await worker.stages(tuned(1))} if given else {}
    with pytest.raises(errors.Invalid, match=text):
        await registry.jobs.complete(job, worker.number, ResultReport.model_validate(members))
    assert (await registry.jobs.get(job)).state == "running"


async def test_an_artifact_is_what_this_attempt_has_staged(registry: AsyncClient):
    job = await tune(registry, None, method="lora")
    first = await Worker.takes(registry, job)
    report = ResultReport(artifact=await first.stages(tuned(1)))
    second = await Worker.takes(registry, job)
    with pytest.raises(errors.StaleAttempt, match="attempt 2 took over"):
        await registry.jobs.complete(job, first.number, report)
    with pytest.raises(errors.Invalid, match="has not staged"):
        await registry.jobs.complete(job, second.number, report)
    staged = await registry.jobs.stage(job, second.number, b"no tensor")
    with pytest.raises(errors.InvalidTensor):
        await registry.jobs.complete(job, second.number, ResultReport(artifact=staged.digest))

    found = await registry.jobs.get(job)
    assert (found.state, found.artifact, found.evaluations) == ("running", None, [])


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"no tensor", "no safetensors file|shorter than a safetensors header"),
        (files.dump({"prompt": START[:2]}), r"the tensor is \[2, 8\]"),
        (files.dump({"other": START}), "one tensor `prompt`"),
    ],
)
async def test_a_result_that_is_no_prompt_leaves_nothing(registry: AsyncClient, content: bytes, text: str):
    job = await tune(registry)
    worker = await Worker.takes(registry, job)
    staged = await registry.jobs.stage(job, 1, content)
    with pytest.raises(errors.InvalidTensor, match=text):
        await registry.jobs.complete(job, 1, ResultReport(prompt=staged.digest))

    assert (await registry.jobs.get(job)).state == "running"
    with pytest.raises(errors.NotFound):
        await registry.vectors.get("cr-own")
    assert (await worker.fails("verification")).reason == "verification"


async def test_reports_on_what_is_not_there_are_refused(client: AsyncClient):
    for report in (client.jobs.get(uuid4()), client.jobs.events(uuid4()), client.jobs.start_attempt(uuid4(), "w", 1)):
        with pytest.raises(errors.NotFound, match="no job"):
            await report


# --- Jobs that need others


async def test_success_hands_its_vector_to_the_job_that_waits_for_it(registry: AsyncClient, queue_tables: QueueTables):
    job = await transfer(registry)
    own = await registry.jobs.get(job.needs[0])
    with pytest.raises(errors.Conflict, match="waits for"):
        await Worker.takes(registry, job)
    await (await Worker.takes(registry, own)).succeeds(tuned(1))
    await job.refresh()

    assert (job.state, job.reason) == ("queued", None)
    assert job.spec.target is not None
    assert job.spec.target.reference == "default/cr-own:1"
    assert queue_tables.entries()[str(job.id)] == ["todo"]
    assert (await Worker.takes(registry, job)).number == 1


async def test_a_transfer_submitted_while_its_target_gets_ready_is_not_forgotten(
    registry: AsyncClient, queue_tables: QueueTables
):
    first = await transfer(registry, output="first")
    worker = await Worker.takes(registry, await registry.jobs.get(first.needs[0]))
    _, *others = await asyncio.gather(
        worker.succeeds(tuned(1)), *(transfer(registry, output=f"other-{i}") for i in range(4))
    )

    for job in (first, *others):
        await job.refresh()
        needed = [(await registry.jobs.get(need)).state for need in job.needs]
        assert str(job.id) in queue_tables.entries() or needed == ["queued"]


async def test_failure_fails_the_jobs_that_wait_for_it(registry: AsyncClient, queue_tables: QueueTables):
    job = await transfer(registry)
    own = await registry.jobs.get(job.needs[0])
    await (await Worker.takes(registry, own)).fails("nan-loss", "diverged at step 3")
    await job.refresh()

    assert (job.state, job.reason) == ("failed", "dependency")
    assert job.message is not None
    assert "diverged at step 3" in job.message
    assert str(job.id) not in queue_tables.entries()
    assert (await registry.jobs.events(job)).finished


# --- Cancelling


async def test_a_queued_job_is_cancelled_at_once(registry: AsyncClient, queue_tables: QueueTables):
    job = await tune(registry)
    await job.cancel()

    assert (job.state, job.reason, job.message) == ("cancelled", "cancelled", "cancelled by local")
    assert queue_tables.entries()[str(job.id)] == ["cancelled"]
    assert (await registry.jobs.cancel(job)).state == "cancelled"  # a second time changes nothing
    with pytest.raises(errors.JobFinished):
        await Worker.takes(registry, job)


async def test_a_running_job_is_cancelled_and_its_worker_told(registry: AsyncClient, queue_tables: QueueTables):
    job = await tune(registry)
    assert queue_tables.take() == str(job.id)
    worker = await Worker.takes(registry, job)
    await job.cancel()

    assert job.state == "cancelled"
    assert [(a.state, a.reason) for a in job.attempts] == [("superseded", "cancelled")]
    assert queue_tables.abort_requested(job.id)
    with pytest.raises(errors.StaleAttempt, match="the job is cancelled"):
        await worker.tells(event("log", message="still here"))
    with pytest.raises(errors.StaleAttempt):
        await worker.succeeds(tuned(1))


async def test_cancelling_fails_the_jobs_that_wait_for_it(registry: AsyncClient):
    job = await transfer(registry)
    await registry.jobs.cancel(job.needs[0])
    await job.refresh()

    assert (job.state, job.reason) == ("failed", "dependency")


async def test_what_has_ended_cannot_be_cancelled(registry: AsyncClient):
    job = await tune(registry)
    await (await Worker.takes(registry, job)).fails()
    with pytest.raises(errors.JobFinished, match="failed already"):
        await job.cancel()


# --- Lost workers


async def test_the_job_of_a_silent_worker_is_queued_again(
    registry: AsyncClient, settings: Settings, queue_tables: QueueTables
):
    job = await tune(registry)
    queue_tables.take(silent_for=31)
    worker = await Worker.takes(registry, job)
    await look_for_lost_jobs(settings)
    await job.refresh()

    assert (job.state, job.reason) == ("queued", "worker-lost")
    assert [(a.state, a.reason) for a in job.attempts] == [("superseded", "worker-lost")]
    assert queue_tables.entries()[str(job.id)] == ["aborted", "todo"]
    with pytest.raises(errors.StaleAttempt, match="the job is queued"):
        await worker.tells(event("log", message="back again"))


async def test_a_worker_that_comes_back_does_not_end_what_another_one_does(
    registry: AsyncClient, settings: Settings, queue_tables: QueueTables
):
    job = await tune(registry)
    queue_tables.take(silent_for=31)
    first = queue_tables.entry(job.id)
    await Worker.takes(registry, job)
    await look_for_lost_jobs(settings)
    with pytest.raises(Exception, match='not in "doing"'):
        queue_tables.finish(first)  # the first worker wakes up

    assert queue_tables.entries()[str(job.id)] == ["aborted", "todo"]
    assert queue_tables.take() == str(job.id)
    done = await (await Worker.takes(registry, job)).succeeds(tuned(1))
    assert done.state == "succeeded"


async def test_a_job_that_its_worker_gave_back_undone_is_queued_again(
    registry: AsyncClient, settings: Settings, queue_tables: QueueTables
):
    job = await tune(registry)
    queue_tables.take()
    queue_tables.finish(queue_tables.entry(job.id))  # it could not reach the service, say
    await look_for_lost_jobs(settings)
    await job.refresh()

    assert (job.state, job.reason, job.attempts) == ("queued", "worker-lost", [])
    assert queue_tables.entries()[str(job.id)] == ["succeeded", "todo"]


async def test_jobs_that_are_well_are_left_alone(registry: AsyncClient, settings: Settings, queue_tables: QueueTables):
    running, _queued, waiting = await tune(registry), await tune(registry, "other"), await transfer(registry, seed=9)
    queue_tables.take()
    await Worker.takes(registry, running)
    before = queue_tables.entries()
    await look_for_lost_jobs(settings)

    assert queue_tables.entries() == before
    assert (await registry.jobs.get(running)).state == "running"
    assert (await registry.jobs.get(waiting)).reason == "waiting"


async def test_the_search_for_lost_jobs_outlives_the_database(settings: Settings):
    away = settings.model_copy(
        update={
            "database_url": SecretStr("postgresql+psycopg://nobody@127.0.0.1:1/away"),
            "stalled_check": timedelta(seconds=0.05),
            "stalled_after": timedelta(seconds=0.05),
        }
    )
    engine = create_engine(away)
    with capture_logs() as logs:
        async with watch_stalled_jobs(away, create_sessionmaker(engine), Queue(away), create_scratch(away)):
            for _ in range(600):
                if len(logs) >= 2:
                    break
                await asyncio.sleep(0.05)

    assert [entry["event"] for entry in logs][:2] == ["cannot look for jobs of lost workers"] * 2
