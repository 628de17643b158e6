"""The worker process: takes jobs from the queue and gives each attempt a child process of its own.

This process never imports torch. Its children are forked from a server process that has imported it once, so that an
attempt starts in milliseconds, and whatever it does to itself takes nobody else along. That server never touches CUDA:
a forked process could not use it any more.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import signal
import threading
from collections.abc import Coroutine, Iterable
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

import structlog
from procrastinate import App, JobContext, PsycopgConnector
from procrastinate.connector import Notify
from procrastinate.exceptions import ConnectorException

from tpv import AsyncClient
from tpv.errors import JobFinished, NotNow, StaleAttempt, TpvError
from tpv.schemas.jobs import AttemptStarted, FailureReport
from tpv.schemas.workers import WorkerReport
from tpv_worker.settings import Settings

log = structlog.get_logger()

TASK = "tpv.run_job"  #: the service defers it under this name
QUEUE_SCHEMA = "procrastinate"
HEARTBEAT = 5.0  #: seconds between two signs of life; without one for 30 s the service gives a worker up
REPORT = 15.0  #: seconds between two reports of what this worker can do
FORGET = 86400.0  #: seconds after which a silent worker is removed from the queue's tables
PATIENCE = 600.0  #: seconds to wait for a database that is away before starting over
TRY_AGAIN = 75  #: exit status of an attempt that lost the service (EX_TEMPFAIL): not the job's fault

# What is slow to import; the T5 module brings everything that transformers' other models use too.
PRELOAD = [
    "tpv_worker.attempt",
    "tpv_worker.capabilities",
    "transformers.models.t5.modeling_t5",
    "transformers.models.llama.modeling_llama",
]


class ServiceLost(TpvError):
    """The attempt could not report to the service; the service puts the job back into the queue."""


async def run_worker(settings: Settings) -> None:
    """Works until SIGTERM or SIGINT; a running attempt then has the grace time to end."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(PRELOAD)
    token = settings.token.get_secret_value() if settings.token else None
    async with AsyncClient(settings.url, token, retries=10) as client:
        app = create_app(settings, client, processes)
        described = asyncio.create_task(_warm_up(processes, settings))
        if await _stopped_before(stop, asyncio.wait([described])):
            return
        log.info("worker is ready", name=settings.name, queues=settings.queues or "all", device=settings.device)
        reporting = asyncio.create_task(_report_for_ever(client, described.result(), stop))
        while not stop.is_set():
            async with app.open_async():
                await _take_jobs(app, settings, stop)
        reporting.cancel()
        with suppress(TimeoutError):
            async with asyncio.timeout(2):
                await _report(client, described.result().model_copy(update={"state": "gone"}))


async def _report_for_ever(client: AsyncClient, report: WorkerReport, stop: asyncio.Event) -> None:
    """Says that this worker is there, and when it begins to stop."""
    while not stop.is_set():
        await _report(client, report)
        await _stopped_before(stop, asyncio.sleep(REPORT))
    await _report(client, report.model_copy(update={"state": "draining"}))


async def _report(client: AsyncClient, report: WorkerReport) -> None:
    try:
        await client.workers.report(report)
    except TpvError as error:  # the next report may come through
        log.warning("cannot report to the service", error=str(error))


async def _take_jobs(app: App, settings: Settings, stop: asyncio.Event) -> None:
    """Runs Procrastinate's worker until `stop`, or until it has lost the database for good."""
    working = asyncio.create_task(
        app.run_worker_async(
            queues=settings.queues,  # type: ignore[arg-type] # None, for every queue, is missing in their type
            concurrency=settings.concurrency,
            name=settings.name,
            # When it starts, a worker removes the entries of those that were silent for so long, and with them what
            # one that was suspended needs to be seen again. Who is lost is the service's to say.
            stalled_worker_timeout=FORGET,
            update_heartbeat_interval=HEARTBEAT,
            shutdown_graceful_timeout=settings.grace.total_seconds(),
            install_signal_handlers=False,
        )
    )
    if await _stopped_before(stop, asyncio.wait([working])):
        working.cancel()  # this asks it to end: it takes no further job, waits for the grace time, then cancels
    try:
        await working
    except asyncio.CancelledError:
        log.info("worker has stopped", name=settings.name)
        return
    except ConnectorException as error:
        log.warning("the queue does not answer", error=repr(error.__cause__ or error))
    await _stopped_before(stop, asyncio.sleep(1))


def create_app(settings: Settings, client: AsyncClient, processes: ForkServerContext) -> App:
    """The queue as a worker sees it, with the one task that it knows."""
    app = App(
        connector=_PatientConnector(
            conninfo=settings.queue_url.get_secret_value(),
            kwargs={"options": f"-c search_path={QUEUE_SCHEMA}"},
            min_size=0,  # a worker starts without a database too
            max_size=settings.concurrency + 2,
            timeout=PATIENCE,
        )
    )

    @app.task(name=TASK, pass_context=True)
    async def run_job(context: JobContext, job: str) -> None:
        """One attempt at a job. Whatever comes of the job stands in its row; this ends well once that is settled."""
        try:
            started = await client.jobs.start_attempt(job, settings.name, context.job.id)
        except (JobFinished, NotNow, StaleAttempt):
            return
        process = processes.Process(target=_attempt, args=(settings, started), daemon=True)
        process.start()
        try:
            await _end_of(process)
        finally:  # also when the job was cancelled, or the grace time is over
            process.kill()
        if process.exitcode == TRY_AGAIN:
            raise ServiceLost(f"job {job} could not report to {client.url}")
        if process.exitcode != 0:
            await _report_death(client, started, process.exitcode or 0)

    return app


def _attempt(settings: Settings, started: AttemptStarted) -> None:
    from tpv_worker.attempt import run_attempt  # preloaded where this runs

    run_attempt(settings, started)


async def _end_of(process: ForkServerProcess) -> None:
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(process.sentinel, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(process.sentinel)
    process.join()


async def _report_death(client: AsyncClient, started: AttemptStarted, status: int) -> None:
    """Speaks for a child that died without a word."""
    if status < 0:
        hint = "; the system does this when memory runs out" if status == -signal.SIGKILL else ""
        message = f"the training process was ended by signal {signal.Signals(-status).name}{hint}"
        failure = FailureReport(reason="killed", message=message)
    else:
        message = f"the training process ended with exit status {status}; see the worker's log"
        failure = FailureReport(reason="crashed", message=message)
    log.warning("attempt died", job=str(started.job), attempt=started.number, message=failure.message)
    with suppress(JobFinished, StaleAttempt):  # it had reported, or was given up
        await client.jobs.fail(started.job, started.number, failure)


# --- Processes and patience ------------------------------------------------------------------------------------------


async def _warm_up(processes: ForkServerContext, settings: Settings) -> WorkerReport:
    """Starts the server that attempts are forked from; gives what its first child finds out when all is imported."""
    warm, loop = asyncio.Event(), asyncio.get_running_loop()
    receiving, sending = processes.Pipe(duplex=False)

    def start() -> None:
        process = processes.Process(target=_describe, args=(settings, sending), daemon=True)
        process.start()
        process.join()
        loop.call_soon_threadsafe(warm.set)

    threading.Thread(target=start, daemon=True).start()  # a daemon: it holds nobody up who wants to stop
    await warm.wait()
    if not receiving.poll():
        raise TpvError(f"cannot use the device {settings.device!r}; see the lines above")
    return WorkerReport.model_validate_json(receiving.recv_bytes())


def _describe(settings: Settings, connection: Connection) -> None:
    from tpv_worker.capabilities import capabilities  # preloaded where this runs

    connection.send_bytes(capabilities(settings).model_dump_json().encode())


async def _stopped_before(stop: asyncio.Event, work: Coroutine[Any, Any, object]) -> bool:
    """Waits for the work to end or for `stop`; whether `stop` came first. Work that has not ended is cancelled."""
    working, stopping = asyncio.create_task(work), asyncio.create_task(stop.wait())
    await asyncio.wait([working, stopping], return_when=asyncio.FIRST_COMPLETED)
    working.cancel()
    stopping.cancel()
    return stop.is_set()


class _PatientConnector(PsycopgConnector):
    """Listens again when the database comes back; a worker would end, and its attempts with it, otherwise."""

    async def listen_notify(self, on_notification: Notify, channels: Iterable[str]) -> None:
        while True:
            try:
                await super().listen_notify(on_notification, channels)
            except ConnectorException as error:
                log.warning("the database does not answer", error=repr(error.__cause__ or error))
                await asyncio.sleep(1)
