"""`client.jobs`: work for the workers, asked for and followed; and what workers themselves report."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

from pydantic import PrivateAttr

from tpv import _base, _content, _paths, errors
from tpv._async.http import AsyncHttp
from tpv._async.similarity import Candidates, pool_of
from tpv._base import Call
from tpv._paths import DatasetLike, InitializationLike, VectorLike
from tpv.schemas import jobs as wire
from tpv.schemas.initializations import BaseModelReference

LONG_POLL = 20.0  #: seconds that one request for events waits at most; the service allows 25
POLL = 0.25  #: seconds between two rounds over several jobs
PAGE = 1000  #: events asked for at once


class AsyncJob(wire.Job):
    """A job as it was when last asked for, with the ways to follow it."""

    _jobs: AsyncJobs = PrivateAttr()

    async def refresh(self) -> AsyncJob:
        """Asks for the job's present state; changes this object and gives it back."""
        self._become(await self._jobs.get(self.id))
        return self

    async def events(self, after: int = 0, *, follow: bool = False) -> AsyncIterator[wire.Event]:
        """The events after `after`, so far; with `follow`, also those to come, until the job has ended."""
        while True:
            page = await self._jobs.events(self.id, after, LONG_POLL if follow else 0, limit=PAGE)
            for event in page.items:
                yield event
            after = page.next_after
            if page.finished if follow else not page.items:
                return

    async def wait(
        self,
        timeout: float | None = None,  # noqa: ASYNC109 # the job goes on after it
        *,
        progress: bool = False,
    ) -> AsyncJob:
        """Waits until the job has ended; changes this object and gives it back.

        Raises JobFailed when it did not succeed, WaitTimeout when it has not ended after `timeout` seconds: the job
        goes on then.
        """
        await self._jobs.wait_all([self], timeout, progress=progress)
        return self

    async def cancel(self) -> AsyncJob:
        """Asks for the job to stop; changes this object and gives it back."""
        self._become(await self._jobs.cancel(self.id))
        return self

    async def retry(self, *, fresh: bool = False) -> AsyncJob:
        """Takes the failed or cancelled job up again; changes this object and gives it back."""
        self._become(await self._jobs.retry(self.id, fresh=fresh))
        return self

    def _become(self, newer: AsyncJob) -> None:
        for name in wire.Job.model_fields:
            setattr(self, name, getattr(newer, name))


JobLike = str | UUID | wire.Job


class AsyncJobs:
    """`client.jobs`: work for the workers, asked for and followed; and what workers themselves report."""

    def __init__(self, http: AsyncHttp) -> None:
        self._http = http

    # --- Asking for work

    async def submit(self, job: wire.JobCreate) -> AsyncJob:
        """Submits a job; versions and fingerprints are resolved now."""
        return self._bind(await self._http.post(AsyncJob, "/jobs", job))

    async def initialize(
        self,
        output: str | None = None,
        *,
        base_model: str | BaseModelReference,
        revision: str | None = None,
        unpinned: bool = False,
        seed: int = 0,
        queue: str | None = None,
        priority: int | None = None,
        min_memory: int | str | None = None,
        needs: Sequence[JobLike] | None = None,
        **options: Any,
    ) -> AsyncJob:
        """Has a worker draw an initialization from the base model; `options` are those of the method `initialize`."""
        members = _base.given(output=output, queue=queue, priority=priority, min_memory=min_memory, needs=_ids(needs))
        model = _base.base_model(base_model, revision, unpinned)
        return await self.submit(
            _base.message(wire.JobCreate, method="initialize", base_model=model, seed=seed, options=options, **members)
        )

    async def tune(
        self,
        *,
        dataset: DatasetLike,
        initialization: InitializationLike,
        output: str | None = None,
        method: str = "prompt-tuning",
        datasets: Sequence[DatasetLike] | None = None,
        preset: str | None = None,
        shots: int | None = None,
        shot_seed: int | None = None,
        seed: int = 0,
        task_type: str | None = None,
        description: str | None = None,
        tags: Mapping[str, str] | None = None,
        queue: str | None = None,
        priority: int | None = None,
        min_memory: int | str | None = None,
        needs: Sequence[JobLike] | None = None,
        **options: Any,
    ) -> AsyncJob:
        """Tunes on a data set, or on several together; a vector is registered as the next version of `output`.

        Methods whose result is an artifact, or figures alone, take no `output`. `options` are the method's own
        (`tpv.methods`): steps, batch_size, learning_rate ...; a `preset` gives those that are left out.
        """
        members = _base.given(
            output=output,
            datasets=_references(datasets),
            preset=preset,
            shots=shots,
            shot_seed=shot_seed,
            task_type=task_type,
            description=description,
            tags=tags,
            queue=queue,
            priority=priority,
            min_memory=min_memory,
            needs=_ids(needs),
        )
        return await self.submit(
            _base.message(
                wire.JobCreate,
                method=method,
                dataset=_paths.reference_of(dataset),
                initialization=_paths.reference_of(initialization),
                seed=seed,
                options=options,
                **members,
            )
        )

    async def transfer(
        self,
        *,
        method: str = "dtvg",
        target: VectorLike | None = None,
        sources: Sequence[VectorLike],
        dataset: DatasetLike,
        output: str | None = None,
        datasets: Sequence[DatasetLike] | None = None,
        preset: str | None = None,
        target_options: Mapping[str, Any] | None = None,
        prepare: Mapping[str, DatasetLike] | None = None,
        initialization: InitializationLike | None = None,
        reference_pool: Candidates = None,
        shots: int | None = None,
        shot_seed: int | None = None,
        seed: int = 0,
        task_type: str | None = None,
        description: str | None = None,
        tags: Mapping[str, str] | None = None,
        queue: str | None = None,
        priority: int | None = None,
        min_memory: int | str | None = None,
        needs: Sequence[JobLike] | None = None,
        **options: Any,
    ) -> AsyncJob:
        """Tunes on a data set with the help of source vectors; a vector is the next version of `output`.

        A method that starts from the target's own vector takes `target`; when that has no version yet, its own prompt
        tuning (with `target_options`) is submitted first and this job waits for it; likewise for sources that have none
        and that `prepare` names, with the data set of each: `prepare={"mnli": "mnli"}`. `datasets` are further ones:
        they are trained with `dataset`, or belong to the sources, in their order, as the method says. `options` are
        the method's own (`tpv.methods`); a `preset` gives those that are left out. `reference_pool` is for
        `center=True`: the vectors, or a Filter of them, whose mean is subtracted.
        """
        members = _base.given(
            target=None if target is None else _paths.reference_of(target),
            output=output,
            datasets=_references(datasets),
            preset=preset,
            reference_pool=pool_of(reference_pool),
            target_options=target_options,
            prepare={name: _paths.reference_of(data) for name, data in prepare.items()} if prepare else None,
            initialization=None if initialization is None else _paths.reference_of(initialization),
            shots=shots,
            shot_seed=shot_seed,
            task_type=task_type,
            description=description,
            tags=tags,
            queue=queue,
            priority=priority,
            min_memory=min_memory,
            needs=_ids(needs),
        )
        return await self.submit(
            _base.message(
                wire.JobCreate,
                method=method,
                sources=[_paths.reference_of(source) for source in sources],
                dataset=_paths.reference_of(dataset),
                seed=seed,
                options=options,
                **members,
            )
        )

    # --- Following it

    async def get(self, job: JobLike) -> AsyncJob:
        """One job, by id."""
        return self._bind(await self._http.get(AsyncJob, f"/jobs/{_paths.job_id(job)}"))

    async def events(
        self, job: JobLike, after: int = 0, wait: float = 0, *, limit: int | None = None
    ) -> wire.EventPage:
        """One page of the events after `after`; waits up to `wait` seconds (at most 25) for the first of them."""
        call = Call(
            method="GET",
            path=f"/jobs/{_paths.job_id(job)}/events",
            params={"after": after, "wait": wait or None, "limit": limit},
            read_timeout=wait + 30.0 if wait else None,
            retries=_base.LONG_WAIT,
        )
        return await self._http.ask(wire.EventPage, call)

    async def logs(self, job: JobLike, *, attempt: int | None = None) -> str:
        """What was said of a job so far, a line each: states, phases, warnings and log lines; of one attempt or all."""
        call = Call(method="GET", path=f"/jobs/{_paths.job_id(job)}/logs", params={"attempt": attempt})
        return (await self._http.send(call)).text

    async def download(self, job: JobLike, path: str | Path, *, progress: bool = False) -> Path:
        """Saves the artifact of a job, a safetensors file, when it is complete and verified.

        Raises NotFound when the job has none: it has not succeeded, or its method gives a vector or figures.
        """
        found = job if isinstance(job, wire.Job) and job.finished else await self.get(job)
        if found.artifact is None:
            raise errors.NotFound(f"job {found.id} has no artifact: it is a {found.state} job of {found.method}")
        target = Path(path)
        with _content.transfer(f"downloading {found.method} {found.id}", found.artifact.size, progress) as advance:
            sink = _content.Sink(target, advance)
            await self._http.download(f"/jobs/{found.id}/artifact", sink, expected=found.artifact.digest)
        return target

    async def cancel(self, job: JobLike) -> AsyncJob:
        """Asks for a job to stop."""
        call = Call(method="POST", path=f"/jobs/{_paths.job_id(job)}/cancel", idempotent=True)
        return self._bind(await self._http.ask(AsyncJob, call))

    async def retry(self, job: JobLike, *, fresh: bool = False) -> AsyncJob:
        """Takes a failed or cancelled job up again, from its last checkpoint or, with `fresh`, from the start.

        Jobs that failed because of it wait for it again.
        """
        message = wire.JobRetry(fresh=fresh)
        return self._bind(await self._http.post(AsyncJob, f"/jobs/{_paths.job_id(job)}/retry", message))

    async def wait_all(
        self,
        jobs: Sequence[AsyncJob],
        timeout: float | None = None,  # noqa: ASYNC109 # the jobs go on after it
        *,
        progress: bool = False,
    ) -> Sequence[AsyncJob]:
        """Waits until all the jobs have ended; raises JobFailed for the first one that did not succeed.

        The others are waited for all the same. Raises WaitTimeout after `timeout` seconds; the jobs go on then.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        after = {job.id: 0 for job in jobs}
        going = list(jobs)
        with contextlib.ExitStack() as stack:
            bars = None
            if progress:
                from tpv.progress import following  # rich is loaded only when something is shown

                bars = stack.enter_context(following(jobs))
            while going:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    names = ", ".join(str(job.id) for job in going)
                    raise errors.WaitTimeout(f"not finished after {timeout:g} s: {names}")
                poll = min(LONG_POLL, left or LONG_POLL) if len(going) == 1 else 0.0  # one can be listened to
                for job in tuple(going):
                    page = await self.events(job.id, after[job.id], poll, limit=PAGE)
                    after[job.id] = page.next_after
                    for event in page.items:
                        if bars is not None:
                            bars.event(job, event)
                    if page.finished:
                        await job.refresh()
                        going.remove(job)
                        if bars is not None:
                            bars.ended(job)
                if len(going) > 1:
                    await asyncio.sleep(POLL if left is None else min(POLL, left))
        for job in jobs:
            if job.state != "succeeded":
                why = f" ({job.reason})" if job.reason else ""
                raise errors.JobFailed(f"job {job.id} {job.state}{why}: {job.message or 'no message'}", job)
        return jobs

    async def list(
        self,
        *,
        state: wire.State | None = None,
        method: str | None = None,
        output: str | None = None,
        page_size: int | None = None,
    ) -> AsyncIterator[AsyncJob]:
        """The jobs that pass the filters, newest first, fetched a page at a time."""
        params = {"state": state, "method": method, "output": output, "limit": page_size}
        async for job in self._http.pages(AsyncJob, "/jobs", params):
            yield self._bind(job)

    # --- Reporting, for workers (scope `worker`); the service takes a report that comes twice for one

    async def start_attempt(self, job: JobLike, worker: str, entry: int) -> wire.AttemptStarted:
        """Begins an attempt at a job; reports of earlier ones are refused from now on (StaleAttempt).

        `entry` is the queue's, by which the job came; StaleAttempt when the service has replaced that one.
        """
        message = wire.AttemptStart(worker=worker, entry=entry)
        return await self._http.post(
            wire.AttemptStarted, f"/jobs/{_paths.job_id(job)}/attempts", message, idempotent=True
        )

    async def report_events(self, job: JobLike, attempt: int, events: Sequence[wire.EventReport]) -> None:
        """Reports what an attempt has come to."""
        message = wire.EventsReport(events=[*events])
        call = Call(method="POST", path=_attempt(job, attempt, "events"), message=message, idempotent=True)
        await self._http.send(call)

    async def stage(self, job: JobLike, attempt: int, content: bytes) -> wire.Staged:
        """Stores a file that the result will name by its digest."""
        call = Call(method="POST", path=_attempt(job, attempt, "staged"), content=content, idempotent=True)
        return await self._http.ask(wire.Staged, call)

    async def staged(self, job: JobLike, attempt: int, digest: str) -> bytes:
        """The content of a staged file, verified."""
        return await self._http.download(_attempt(job, attempt, f"staged/{digest}"), _content.Sink(), expected=digest)

    async def save_checkpoint(self, job: JobLike, attempt: int, step: int, content: bytes) -> wire.Checkpoint:
        """Keeps the attempt's state after a step, for the next attempt to go on from; the newest two are kept."""
        call = Call(method="PUT", path=_attempt(job, attempt, "checkpoint"), params={"step": step}, content=content)
        return await self._http.ask(wire.Checkpoint, call)

    async def checkpoint(self, job: JobLike, attempt: int, digest: str) -> bytes:
        """The content of a checkpoint that is still kept, verified, for this attempt to go on from.

        Raises DamagedContent where the stored file is, and FingerprintMismatch where what arrives is.
        """
        path = _attempt(job, attempt, f"checkpoints/{digest}")
        return await self._http.download(path, _content.Sink(), expected=digest)

    async def complete(self, job: JobLike, attempt: int, result: wire.ResultReport) -> AsyncJob:
        """Commits the result: version, evaluations, lineage and `succeeded` appear together."""
        path = _attempt(job, attempt, "result")
        return self._bind(await self._http.post(AsyncJob, path, result, idempotent=True))

    async def fail(self, job: JobLike, attempt: int, failure: wire.FailureReport) -> AsyncJob:
        """Ends the attempt without a result."""
        path = _attempt(job, attempt, "failure")
        return self._bind(await self._http.post(AsyncJob, path, failure, idempotent=True))

    def _bind(self, job: AsyncJob) -> AsyncJob:
        job._jobs = self
        return job


def _references(datasets: Sequence[DatasetLike] | None) -> list[str] | None:
    """None when there are none: the wire has no empty list of data sets."""
    return [_paths.reference_of(dataset) for dataset in datasets or ()] or None


def _ids(jobs: Sequence[JobLike] | None) -> list[str] | None:
    return [str(_paths.job_id(job)) for job in jobs] if jobs else None


def _attempt(job: JobLike, attempt: int, what: str) -> str:
    return f"/jobs/{_paths.job_id(job)}/attempts/{attempt}/{what}"
