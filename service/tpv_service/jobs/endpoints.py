"""Jobs: submitted, followed and cancelled by users; worked on and reported by workers."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.responses import PlainTextResponse, Response, StreamingResponse

from tpv.errors import Forbidden, NotFound, NotNow
from tpv.references import Reference
from tpv.schemas.base import Page
from tpv.schemas.jobs import (
    AttemptStart,
    AttemptStarted,
    Checkpoint,
    EventPage,
    EventsReport,
    FailureReport,
    Job,
    JobCreate,
    JobRetry,
    ResultReport,
    Staged,
    State,
)
from tpv_service import problems
from tpv_service.auth.tokens import Actor, Allowed
from tpv_service.content import content_response
from tpv_service.db import Session
from tpv_service.idempotency import IdempotentRequest
from tpv_service.jobs import queries, report
from tpv_service.jobs.cancel import cancel_job
from tpv_service.jobs.retry import retry_job
from tpv_service.jobs.stream import LOOK_EVERY, event_stream, log_lines
from tpv_service.jobs.submit import resolve_job, submit_job
from tpv_service.jobs.tables import JobRow
from tpv_service.jobs.view import job_view
from tpv_service.pagination import PagingQuery, page

router = APIRouter(tags=["jobs"], prefix="/jobs")
Reader = Annotated[Actor, Depends(Allowed("read", "write", "worker"))]
Writer = Annotated[Actor, Depends(Allowed("write"))]
Worker = Annotated[Actor, Depends(Allowed("worker"))]


async def _of_own_attempt(request: Request, actor: Worker, job: UUID, number: int) -> Actor:
    """Who reports on an attempt has begun it; another worker's token cannot speak for it."""
    async with request.state.readers() as session:
        began = await queries.attempt_actor(session, job, number)
    if began not in (None, actor.name) and "admin" not in actor.scopes:
        raise Forbidden(f"attempt {number} of job {job} was begun with another token than {actor.name!r}")
    return actor


Reporter = Annotated[Actor, Depends(_of_own_attempt)]


@router.post("", status_code=201, response_model=Job)
async def post_job(
    request: Request, session: Session, actor: Writer, idempotency: IdempotentRequest, job: JobCreate
) -> Response:
    """Submits a job; names are resolved to versions and fingerprints now."""
    if kept := await idempotency.kept(session, actor.name, job):
        return kept
    spec, first = await resolve_job(request, session, job)
    if kept := await idempotency.begin(session, actor.name, job):
        return kept
    row = await submit_job(session, request.state.queue, job, spec, first, actor.name)
    return await idempotency.finish(session, job_view(row), 201)


@router.get("")
async def list_jobs(
    session: Session,
    _: Reader,
    paging: PagingQuery,
    state: State | None = None,
    method: str | None = None,
    output: str | None = None,
) -> Page[Job]:
    """Jobs, newest first."""
    statement = queries.full_job()
    if state:
        statement = statement.where(JobRow.state == state)
    if method:
        statement = statement.where(JobRow.method == method)
    if output:
        name = Reference.parse(output)
        statement = statement.where(JobRow.output_namespace == name.namespace, JobRow.output_name == name.name)
    return await page(session, statement, [JobRow.id], lambda row: [row.id], job_view, paging, descending=True)


@router.get("/{job}")
async def get_job(session: Session, _: Reader, job: UUID) -> Job:
    """One job with its attempts."""
    return job_view(await queries.job_by_id(session, job))


@router.get(
    "/{job}/events",
    response_model=EventPage,
    responses={200: {"content": {"text/event-stream": {}}}, 204: {"description": "A stream after the last event."}},
)
async def list_events(
    request: Request,
    _: Reader,
    job: UUID,
    after: Annotated[int, Query(ge=0)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    wait: Annotated[float, Query(ge=0, le=25, description="Seconds to wait for the first event.")] = 0,
    last_event_id: Annotated[int | None, Header(ge=0, description="Of a stream that broke off.")] = None,
) -> EventPage | Response:
    """The job's events after one of them, oldest first; waits for some to come, holding no connection meanwhile.

    With `Accept: text/event-stream`, a stream of them until the job has ended.
    """
    if "text/event-stream" in request.headers.get("accept", ""):
        return await event_stream(request.state.readers, job, after if last_event_id is None else last_event_id)
    deadline = time.monotonic() + wait
    while True:
        async with request.state.readers() as session:
            events = await queries.event_page(session, job, after, limit)
        if events.items or events.finished or time.monotonic() >= deadline:
            return events
        await asyncio.sleep(LOOK_EVERY)


@router.get("/{job}/logs", response_class=PlainTextResponse)
async def get_logs(
    request: Request, session: Session, _: Reader, job: UUID, attempt: Annotated[int | None, Query(ge=1)] = None
) -> StreamingResponse:
    """What was said of the job so far, as text, a line each; of one attempt, or of all."""
    await queries.job_by_id(session, job)
    lines = log_lines(request.state.readers, job, attempt)
    return StreamingResponse(lines, media_type="text/plain; charset=utf-8")


@router.get("/{job}/artifact", response_class=Response)
async def get_artifact(request: Request, _: Reader, job: UUID) -> Response:
    """The result of a method that gives no vector, as safetensors: the method's own tensors, float32."""
    async with request.state.readers() as session:
        row = await queries.job_by_id(session, job)
    if row.artifact is None:
        raise NotFound(f"job {job} has no artifact: it is a {row.state} job of the method {row.method}")
    return await content_response(
        request,
        row.artifact,
        media_type="application/octet-stream",
        filename=f"{row.method}-{job}.safetensors",
    )


@router.post("/{job}/retry", response_model=Job)
async def retry(
    request: Request, session: Session, actor: Writer, idempotency: IdempotentRequest, job: UUID, retried: JobRetry
) -> Response:
    """Takes a failed or cancelled job up again, from its last checkpoint or, with `fresh`, from the start."""
    if kept := await idempotency.begin(session, actor.name, retried):
        return kept
    row = await retry_job(session, request.state.queue, job, actor.name, fresh=retried.fresh)
    return await idempotency.finish(session, job_view(row), 200)


@router.post("/{job}/cancel")
async def cancel(request: Request, session: Session, actor: Writer, job: UUID) -> Job:
    """Calls a queued or running job off; jobs that need it fail."""
    return job_view(await cancel_job(session, request.state.queue, job, actor.name))


# --- Reports of workers ----------------------------------------------------------------------------------------------


@router.post("/{job}/attempts", status_code=201, response_model=AttemptStarted)
async def start_attempt(
    request: Request, session: Session, actor: Worker, job: UUID, attempt: AttemptStart
) -> AttemptStarted | Response:
    """A worker begins an attempt; reports of earlier ones are refused from now on. 409 when the job may not start."""
    started = await report.start_attempt(session, request.state.queue, job, attempt, actor.name)
    return problems.answer(started) if isinstance(started, NotNow) else started


@router.post("/{job}/attempts/{number}/events", status_code=204)
async def report_events(session: Session, _: Reporter, job: UUID, number: int, events: EventsReport) -> None:
    """What the attempt has come to."""
    await report.report_events(session, job, number, events.events)


@router.post(
    "/{job}/attempts/{number}/staged",
    status_code=201,
    openapi_extra={"requestBody": {"required": True, "content": {"application/octet-stream": {}}}},
)
async def stage_file(request: Request, session: Session, _: Reporter, job: UUID, number: int) -> Staged:
    """Stores a file, the request's body, that the result will name by its digest."""
    return await report.stage_file(session, request.state.scratch, job, number, await request.body())


@router.get("/{job}/attempts/{number}/staged/{digest}", response_class=Response)
async def get_staged_file(request: Request, _: Reporter, job: UUID, number: int, digest: str) -> Response:
    """A file that the attempt has stored."""
    async with request.state.readers() as session:
        staged = await queries.staged_files(session, job, number)
    if digest not in staged:
        raise NotFound(f"attempt {number} of job {job} has not staged {digest}")
    return await _scratch_response(request, digest)


async def _scratch_response(request: Request, digest: str) -> Response:
    store = request.state.scratch
    return await content_response(
        request, digest, media_type="application/octet-stream", filename=digest[7:], store=store
    )


@router.put(
    "/{job}/attempts/{number}/checkpoint",
    status_code=201,
    openapi_extra={"requestBody": {"required": True, "content": {"application/octet-stream": {}}}},
)
async def put_checkpoint(
    request: Request,
    session: Session,
    _: Reporter,
    job: UUID,
    number: int,
    step: Annotated[int, Query(ge=0, lt=2**31)],
) -> Checkpoint:
    """Keeps the attempt's state after a step, the request's body, for the next attempt to go on from."""
    return await report.save_checkpoint(session, request.state.scratch, job, number, step, await request.body())


@router.get("/{job}/attempts/{number}/checkpoints/{digest}", response_class=Response)
async def get_checkpoint(request: Request, _: Reporter, job: UUID, number: int, digest: str) -> Response:
    """A checkpoint of the job that is still kept, for this attempt to go on from."""
    async with request.state.readers() as session:
        if await queries.attempt_actor(session, job, number) is None:
            raise NotFound(f"job {job} has no attempt {number}")
        kept = {row.digest for row in await queries.checkpoints(session, job) if row.attempt <= number}
    if digest not in kept:
        raise NotFound(f"job {job} keeps no checkpoint {digest}")
    return await _scratch_response(request, digest)


@router.post("/{job}/attempts/{number}/result")
async def report_result(
    request: Request, session: Session, _: Reporter, job: UUID, number: int, result: ResultReport
) -> Job:
    """Commits the result: version, initialization or artifact, evaluations, lineage and `succeeded` appear together."""
    stores = report.Stores(request.state.store, request.state.scratch)
    return job_view(await report.report_result(session, stores, request.state.queue, job, number, result))


@router.post("/{job}/attempts/{number}/failure")
async def report_failure(
    request: Request, session: Session, _: Reporter, job: UUID, number: int, failure: FailureReport
) -> Job:
    """Ends the attempt without a result, and the job too, unless the reason is no fault of its own."""
    return job_view(await report.report_failure(session, request.state.queue, job, number, failure))
