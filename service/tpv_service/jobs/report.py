"""What workers report: an attempt begins, tells how it goes, stores files, and ends with a result or a failure.

Every report carries the attempt's number. Only the current attempt of a running job is listened to, so a worker that
was given up and comes back changes nothing. An answer may be lost on its way and the report come again: a second start
is a new attempt, a second result or failure of the attempt that ended the job gives the same answer again.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Any, NamedTuple
from uuid import UUID

from pydantic import ValidationError
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.concurrency import run_in_threadpool

from tpv import files
from tpv.errors import Conflict, Invalid, InvalidTensor, JobFinished, NotNow, StaleAttempt
from tpv.methods import METHODS
from tpv.references import DEFAULT_NAMESPACE
from tpv.schemas.jobs import (
    RETRIED,
    AttemptStart,
    AttemptStarted,
    Checkpoint,
    EventReport,
    FailureReport,
    JobSpec,
    Progress,
    ResultReport,
    Staged,
)
from tpv.schemas.vectors import EvaluationCreate, Parent, VersionCreate
from tpv.vectors import Float32, as_prompt
from tpv_service.db import release
from tpv_service.jobs import queries
from tpv_service.jobs.held import hold_back
from tpv_service.jobs.lifecycle import end_attempt, finish, give_back, has_ended, show
from tpv_service.jobs.submit import tasks_of
from tpv_service.jobs.tables import AttemptRow, CheckpointRow, EventRow, JobRow, StagedRow
from tpv_service.queue import Queue
from tpv_service.registry import publish
from tpv_service.registry.queries import resolve_initialization
from tpv_service.registry.tables import EvaluationRow
from tpv_service.storage import BlobStore

SPEED_OVER = 30.0  #: seconds; what was before counts for 1/e
CHECKPOINTS = 2  #: kept of a job: should the newest be damaged, there is the one before


class Stores(NamedTuple):
    kept: BlobStore  #: for what is registered
    scratch: BlobStore  #: for what attempts have stored on their way


async def start_attempt(
    session: AsyncSession, queue: Queue, job_id: UUID, report: AttemptStart, actor: str
) -> AttemptStarted | NotNow:
    """Begins the next attempt, by the job's present entry in the queue, which a worker has been given.

    An attempt that still runs is superseded: its worker has asked again, because the answer was lost or it was started
    anew. Gives NotNow, instead of raising it, when the job is held back: that is written down.
    """
    job = await queries.lock_job(session, job_id)
    if has_ended(job):
        raise JobFinished(f"job {job_id} is {job.state} already")
    if job.queue_id is None:
        raise Conflict(f"job {job_id} waits for others: {job.message}")
    if report.entry != job.queue_id:
        raise StaleAttempt(f"job {job_id} was given to another worker meanwhile, by another entry of the queue")
    if not await queue.has_given(session, report.entry):
        raise StaleAttempt(f"job {job_id} waits in the queue: nobody was given its entry {report.entry} yet")
    attempt = await queries.current_attempt(session, job)
    if job.state == "running" and attempt is not None and attempt.actor != actor:
        raise StaleAttempt(f"attempt {attempt.number} of job {job_id} runs, begun with another token than {actor!r}")
    if message := await hold_back(session, queue, job, report.worker):
        return NotNow(f"job {job_id} {message}")
    await end_attempt(session, job, "superseded", "worker-lost", f"attempt {job.attempt + 1} took over")
    job.attempt += 1
    job.reported_at = datetime.now(UTC)
    job.started_at = job.started_at or job.reported_at
    job.progress = {}
    session.add(AttemptRow(job_id=job.id, number=job.attempt, worker=report.worker, actor=actor, state="running"))
    show(session, job, "running")
    return AttemptStarted(
        job=job.id,
        number=job.attempt,
        spec=JobSpec.model_validate(job.spec),
        checkpoints=[Checkpoint.model_validate(row) for row in await queries.checkpoints(session, job.id)],
    )


async def report_events(session: AsyncSession, job_id: UUID, number: int, events: list[EventReport]) -> None:
    """Keeps the events and shows the newest figures. An attempt's times grow: what comes a second time is known."""
    job = await _lock_current(session, job_id, number)
    newest = await queries.newest_report(session, job_id, number)
    new = [event for event in events if newest is None or event.at > newest]
    session.add_all(EventRow(job_id=job_id, attempt=number, **event.model_dump()) for event in new)
    job.progress = _progress(job.progress, new, job.spec["options"].get("batch_size"))


def _progress(progress: dict[str, Any], events: list[EventReport], batch_size: int | None) -> dict[str, Any]:
    """Where the job is after these events."""
    where = Progress.model_validate(progress)
    try:
        for event in events:
            if event.type == "group":
                said = {"group": event.data.get("members"), "group_changes": event.data.get("changes")}
            elif event.type in ("progress", "evaluation"):
                said = {name: event.data[name] for name in Progress.model_fields if name in event.data}
            else:
                continue
            newer = Progress.model_validate({**where.model_dump(), **said})
            where = _with_speed(where, newer, event.at, batch_size) if event.type == "progress" else newer
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise Invalid(f"an event's {'.'.join(map(str, wrong['loc']))}: {wrong['msg']}") from error
    return where.model_dump(mode="json", exclude_none=True)


def _with_speed(before: Progress, now: Progress, at: datetime, batch_size: int | None) -> Progress:
    """With the speed of the last seconds, validations included, and the time that is left at this speed."""
    now = now.model_copy(update={"at": at})
    if before.step is None or before.at is None or now.step is None or not batch_size:
        return now
    seconds, steps = (at - before.at).total_seconds(), now.step - before.step
    if seconds <= 0 or steps < 0:
        return now
    speed = steps * batch_size / seconds
    if before.samples_per_second is not None:
        weight = math.exp(-seconds / SPEED_OVER)
        speed = weight * before.samples_per_second + (1 - weight) * speed
    left = (now.steps - now.step) * batch_size / speed if now.steps is not None and speed > 0 else None
    return now.model_copy(update={"samples_per_second": speed, "eta": left})


async def stage_file(session: AsyncSession, scratch: BlobStore, job_id: UUID, number: int, content: bytes) -> Staged:
    """Stores a file of the attempt; first the blob is durable, then the row that points to it."""
    digest = await run_in_threadpool(scratch.put, content)
    await _lock_current(session, job_id, number)
    row = {"job_id": job_id, "attempt": number, "digest": digest, "size": len(content)}
    await session.execute(insert(StagedRow).values(row).on_conflict_do_nothing())
    return Staged(digest=digest, size=len(content))


async def save_checkpoint(
    session: AsyncSession, scratch: BlobStore, job_id: UUID, number: int, step: int, content: bytes
) -> Checkpoint:
    """Keeps the attempt's state after a step, and the one before; the file is durable before a row points to it."""
    digest = await run_in_threadpool(scratch.put, content)
    job = await _lock_current(session, job_id, number)
    job.lost = 0  # whatever happens next, the job has come on
    row = {"job_id": job_id, "attempt": number, "step": step, "digest": digest, "size": len(content)}
    made = insert(CheckpointRow).values(row).on_conflict_do_nothing().returning(CheckpointRow.step)
    if await session.scalar(made) is not None:  # else the report has come a second time
        data = {"step": step, "size": len(content)}
        session.add(
            EventRow(job_id=job_id, attempt=number, type=queries.CHECKPOINT_EVENT, at=datetime.now(UTC), data=data)
        )
        await queries.drop_checkpoints(session, job_id, but=CHECKPOINTS)
    return Checkpoint(attempt=number, step=step, digest=digest, size=len(content))


async def report_failure(
    session: AsyncSession, queue: Queue, job_id: UUID, number: int, report: FailureReport
) -> JobRow:
    """Ends the attempt without a result, and the job too, unless another attempt may do better."""
    job = await queries.lock_job(session, job_id)
    attempt = await queries.current_attempt(session, job)
    if job.attempt != number or attempt is None or attempt.state != "failed":
        _check_current(job, number)
        await end_attempt(session, job, "failed", report.reason, report.message)
        if report.reason in RETRIED:
            await give_back(session, queue, job, report.reason, report.message)
        else:
            await finish(session, queue, job, "failed", report.reason, report.message)
    await session.flush()
    return await queries.job_by_id(session, job_id)


async def report_result(
    session: AsyncSession, stores: Stores, queue: Queue, job_id: UUID, number: int, report: ResultReport
) -> JobRow:
    """The one committing call of a job: result, evaluations, lineage and `succeeded` appear together.

    First the blobs are durable, then everything that points to them is written under the job's row lock.
    """
    job = await queries.job_by_id(session, job_id)
    if not _ended_by(job, number, "succeeded"):
        _check_current(job, number)
        await _check_staged(session, job, report)
        spec = JobSpec.model_validate(job.spec)
        result = METHODS[spec.method].result
        _check_result(job, result, report)
        await release(session)
        await run_in_threadpool(_keep_files, stores, report)
        match result:
            case "initialization":
                await _commit_initialization(session, stores, job, spec, report)
            case "vector":
                await _commit_vector(session, stores, job, spec, report)
            case "artifact" | "metrics":
                await _commit_figures(session, job, report)
        job.metrics = report.metrics
        await end_attempt(session, job, "succeeded")
        await finish(session, queue, job, "succeeded")
    await session.flush()
    return await queries.job_by_id(session, job_id)


def _check_result(job: JobRow, result: str, report: ResultReport) -> None:
    """Raises Invalid unless the report has the file that a result of this kind is, and no other."""
    expected = {"initialization": "prompt", "vector": "prompt", "artifact": "artifact"}.get(result)
    given = {name for name in ("prompt", "artifact") if getattr(report, name)}
    if given != {expected} - {None}:
        raise Invalid(
            f"the result of {job.method} is {result}: its report names "
            f"{f'one file, `{expected}`' if expected else 'no file'}, not {', '.join(sorted(given)) or 'none'}"
        )


def _keep_files(stores: Stores, report: ResultReport) -> None:
    """Stores for good what is kept as it was staged."""
    if report.artifact and not files.load(stores.scratch.get(report.artifact)):
        raise InvalidTensor("an artifact's file holds the method's tensors; this one has none")
    kept = {report.artifact, report.state, *(figure.predictions for figure in report.evaluations)} - {None}
    for digest in sorted(filter(None, kept)):
        stores.kept.put(stores.scratch.get(digest))


async def _commit_initialization(
    session: AsyncSession, stores: Stores, job: JobRow, spec: JobSpec, report: ResultReport
) -> None:
    tensor, digest, size = await run_in_threadpool(_store_initialization, stores, str(report.prompt))
    await _lock_current(session, job.id, job.attempt)
    row, created = await publish.publish_initialization(
        session,
        namespace=job.output_namespace or DEFAULT_NAMESPACE,
        name=job.output_name,
        base_model=spec.base_model,
        facts=report.base_model_facts,
        strategy=spec.options["strategy"],
        parameters={**spec.options, "seed": spec.seed},
        tensor=tensor,
        digest=digest,
        size=size,
        actor=job.actor,
    )
    job.result_initialization_id, job.result_created = row.id, created


def _store_initialization(stores: Stores, staged: str) -> tuple[Float32, str, int]:
    tensor = _staged_prompt(stores.scratch, staged)
    content = files.dump({"prompt": tensor})
    return tensor, stores.kept.put(content), len(content)


async def _commit_vector(
    session: AsyncSession, stores: Stores, job: JobRow, spec: JobSpec, report: ResultReport
) -> None:
    assert spec.initialization is not None  # submit.py: whatever gives a vector has both
    assert spec.dataset is not None
    initialization = await resolve_initialization(session, str(spec.initialization.initialization_id))
    await release(session)
    stored = await run_in_threadpool(_store_vector, stores, initialization.digest, str(report.prompt))
    await _lock_current(session, job.id, job.attempt)
    figures = [figure.model_dump(exclude={"predictions"}) for figure in report.evaluations]
    version, created = await publish.publish_version(
        session,
        namespace=str(job.output_namespace),
        name=str(job.output_name),
        metadata=VersionCreate(
            initialization=str(initialization.id),
            task=tasks_of(METHODS[spec.method], spec.dataset, spec.datasets),
            task_type=spec.task_type,
            description=spec.description,
            tags=spec.tags,
            metrics=[EvaluationCreate.model_validate(figure) for figure in figures],
            method=spec.method,
            hyperparameters={**spec.options, "shots": spec.shots, "shot_seed": spec.shot_seed, "seed": spec.seed},
            dataset_fingerprint=spec.dataset.fingerprint,
            provenance={
                **report.provenance,
                "job": str(job.id),
                "attempt": job.attempt,
                "seed": spec.seed,
                "dataset": spec.dataset.reference,
                "datasets": [further.reference for further in spec.datasets],
                "preset": spec.preset,
                "center": spec.center.model_dump(exclude={"vector"}) if spec.center else None,
                "metrics": report.metrics,
            },
            parents=_parents(spec),
        ),
        initialization=initialization,
        stored=stored,
        state=report.state,
        actor=job.actor,
        job=job.id,
        predictions=[figure.predictions for figure in report.evaluations],
    )
    job.result_version_id, job.result_created = version.id, created


async def _commit_figures(session: AsyncSession, job: JobRow, report: ResultReport) -> None:
    """What belongs to the job alone: evaluations, and the artifact where the method gives one."""
    size = None
    await _lock_current(session, job.id, job.attempt)
    if report.artifact is not None:
        staged = await queries.staged_files(session, job.id, job.attempt)
        size = staged[report.artifact].size
    job.artifact, job.artifact_size, job.provenance = report.artifact, size, report.provenance
    session.add_all(EvaluationRow(job_id=job.id, **figure.model_dump()) for figure in report.evaluations)


def _parents(spec: JobSpec) -> list[Parent]:
    parents = [Parent(reference=v.reference, fingerprint=v.fingerprint, role="source") for v in spec.sources]
    if spec.target is not None:
        target = Parent(reference=spec.target.reference, fingerprint=spec.target.fingerprint, role="target")
        parents.insert(0, target)
    return parents


def _store_vector(stores: Stores, initialization: str, staged: str) -> publish.StoredVector:
    start = publish.load_start(stores.kept, initialization)
    return publish.store_vector(stores.kept, start=start, prompt=_staged_prompt(stores.scratch, staged))


def _staged_prompt(scratch: BlobStore, digest: str) -> Float32:
    tensors = files.load(scratch.get(digest))
    if set(tensors) != {"prompt"}:
        raise InvalidTensor(f"a result's file holds one tensor `prompt`; this one has {sorted(tensors) or 'none'}")
    return as_prompt(tensors["prompt"], "prompt")


# --- Fencing ---------------------------------------------------------------------------------------------------------


async def _lock_current(session: AsyncSession, job_id: UUID, number: int) -> JobRow:
    """The locked job, if this is its current attempt and it is running; raises StaleAttempt otherwise."""
    job = await queries.lock_job(session, job_id)
    _check_current(job, number)
    job.reported_at = datetime.now(UTC)
    return job


def _check_current(job: JobRow, number: int) -> None:
    if job.state != "running" or job.attempt != number:
        now = f"the job is {job.state}" if job.attempt == number else f"attempt {job.attempt} took over"
        raise StaleAttempt(f"attempt {number} of job {job.id} is not running any more: {now}; stop it")


def _ended_by(job: JobRow, number: int, state: str) -> bool:
    return job.attempt == number and job.state == state


async def _check_staged(session: AsyncSession, job: JobRow, report: ResultReport) -> None:
    """Only what this attempt has stored can become part of its result."""
    named = [report.prompt, report.artifact, report.state, *(figure.predictions for figure in report.evaluations)]
    staged = await queries.staged_files(session, job.id, job.attempt)
    if missing := sorted({digest for digest in named if digest} - set(staged)):
        raise Invalid(f"this attempt has not staged {', '.join(missing)}", missing=missing)
