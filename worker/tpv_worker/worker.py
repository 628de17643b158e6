"""The worker process: takes jobs from the queue and gives each attempt a child process of its own.

This process never imports torch. Its children are forked from processes that have imported it, and loaded the model,
once (`tpv_worker.hosts`), so that an attempt starts in milliseconds, and whatever it does to itself takes nobody else
along.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import signal
import threading
from collections import Counter
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import Any, NamedTuple

import structlog
from procrastinate import App, JobContext, PsycopgConnector
from procrastinate.connector import Notify
from procrastinate.exceptions import ConnectorException

from tpv import AsyncClient
from tpv.errors import Forbidden, JobFinished, NotNow, StaleAttempt, TpvError, Unauthorized
from tpv.schemas.jobs import AttemptStarted, FailureReport
from tpv.schemas.workers import WorkerReport
from tpv_worker.hosts import HOST_ENDED, NOT_FORKED, Hosts, Running
from tpv_worker.settings import Settings

log = structlog.get_logger()

TASK = "tpv.run_job"  #: the service defers it under this name
QUEUE_SCHEMA = "procrastinate"
HEARTBEAT = 5.0  #: seconds between two signs of life; without one for 30 s the service gives a worker up
REPORT = 15.0  #: seconds between two reports of what this worker can do
FORGET = 86400.0  #: seconds after which a silent worker is removed from the queue's tables
PATIENCE = 600.0  #: seconds to wait for a database that is away before starting over
KILLED = 10.0  #: seconds in which a killed process is gone, but for one that hangs in the kernel
TRY_AGAIN = 75  #: exit status of an attempt that lost the service (EX_TEMPFAIL): not the job's fault

# A connection that broke without a word, as behind a firewall, is noticed within half a minute; the kernel takes hours.
_KEEPALIVE = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 25_000}

# What is slow to import; the T5 module brings everything that transformers' other models use too.
PRELOAD = [
    "tpv_worker.attempt",
    "tpv_worker.capabilities",
    "transformers.models.t5.modeling_t5",
    "transformers.models.llama.modeling_llama",
]


class ServiceLost(TpvError):
    """The attempt could not report to the service; the service puts the job back into the queue."""


class Stop(asyncio.Event):
    """Set when the worker is to stop."""

    error: TpvError | None = None  #: why, unless it was asked to

    def because_of(self, error: TpvError) -> None:
        self.error = error
        self.set()


async def run_worker(settings: Settings) -> None:
    """Works until SIGTERM or SIGINT. What trains then ends after its step, kept for another worker to go on with.

    What loads, verifies or reports at that moment has the grace time to end. It stops in the same way, and raises
    Unauthorized or Forbidden, when the service does not take its token: else it would spoil one job after another.
    """
    stop = Stop()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(PRELOAD)
    token = settings.token.get_secret_value() if settings.token else None
    async with AsyncClient(settings.url, token, retries=10) as client:
        described = asyncio.create_task(_warm_up(processes, settings))
        if await _stopped_before(stop, asyncio.wait([described])):
            return
        slots = Slots(described.result().slots, settings.concurrency)
        report = described.result().report
        if await _stopped_before(stop, _report(client, report)):
            return
        log.info("worker is ready", name=settings.name, queues=settings.queues or "all", devices=slots.devices)
        reporting = asyncio.create_task(_report_for_ever(client, report, stop))
        with closing(Hosts(processes, settings)) as hosts:
            app = create_app(settings, client, hosts, slots, stop)
            while not stop.is_set():
                async with app.open_async():
                    await _take_jobs(app, settings, slots.count, stop)
        reporting.cancel()
        if stop.error is not None:
            raise stop.error
        with suppress(TimeoutError):
            async with asyncio.timeout(2):
                await _report(client, report.model_copy(update={"state": "gone"}))


class Slots:
    """Which devices an attempt gets, one for each of its processes: those with the fewest, the first ones on ties."""

    def __init__(self, devices: Sequence[tuple[str, ...]], concurrency: int | None) -> None:
        """One attempt at a time for each of the entries, unless the concurrency says another number for all."""
        self.devices, self.count = devices, concurrency or len(devices)
        self._used = Counter[tuple[str, ...]]()

    @contextmanager
    def take(self) -> Iterator[tuple[str, ...]]:
        devices = min(self.devices, key=lambda devices: self._used[devices])
        self._used[devices] += 1
        try:
            yield devices
        finally:
            self._used[devices] -= 1


async def _report_for_ever(client: AsyncClient, report: WorkerReport, stop: Stop) -> None:
    """Says that this worker is still there, and when it begins to stop."""
    try:
        while not await _stopped_before(stop, asyncio.sleep(REPORT)):
            await _report(client, report)
        await _report(client, report.model_copy(update={"state": "draining"}))
    except (Unauthorized, Forbidden) as error:
        stop.because_of(error)


async def _report(client: AsyncClient, report: WorkerReport) -> None:
    """Raises Unauthorized or Forbidden when the service does not take this worker's token."""
    try:
        await client.workers.report(report)
    except (Unauthorized, Forbidden):
        raise
    except TpvError as error:  # the next report may come through
        log.warning("cannot report to the service", error=str(error))


async def _take_jobs(app: App, settings: Settings, concurrency: int, stop: asyncio.Event) -> None:
    """Runs Procrastinate's worker until `stop`, or until it has lost the database for good."""
    working = asyncio.create_task(
        app.run_worker_async(
            queues=settings.queues,  # type: ignore[arg-type] # None, for every queue, is missing in their type
            concurrency=concurrency,
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


def create_app(settings: Settings, client: AsyncClient, hosts: Hosts, slots: Slots, stop: Stop) -> App:
    """The queue as a worker sees it, with the one task that it knows."""
    app = App(
        connector=_PatientConnector(
            conninfo=settings.queue_url.get_secret_value(),
            kwargs={"options": f"-c search_path={QUEUE_SCHEMA}"} | _KEEPALIVE,
            min_size=0,  # a worker starts without a database too
            max_size=slots.count + 2,
            timeout=PATIENCE,
        )
    )

    @app.task(name=TASK, pass_context=True)
    async def run_job(context: JobContext, job: str) -> None:
        """One attempt at a job. Whatever comes of the job stands in its row; this ends well once that is settled."""
        assert context.job.id is not None  # it has come from the queue
        try:
            started = await client.jobs.start_attempt(job, settings.name, context.job.id)
        except (JobFinished, NotNow, StaleAttempt) as error:
            log.info("job was not started", job=job, error=str(error))
            return
        except (Unauthorized, Forbidden) as error:
            log.error("the service does not take this worker's token; the worker stops", job=job, error=str(error))
            stop.because_of(error)
            raise
        with slots.take() as devices:
            attempt = hosts.start(started, devices)
            try:
                status = await _status_of(attempt, app, context.job.worker_id, stop)
            except asyncio.CancelledError:  # the job was cancelled, or the grace time is over
                attempt.kill()
                if stop.is_set():
                    message = (
                        f"the worker has stopped; the attempt did not end within {settings.grace.total_seconds():g} s"
                    )
                    await _fail(client, started, FailureReport(reason="drained", message=message))
                # Until it has ended it holds memory of the device, which the next attempt there would lack.
                await asyncio.wait([attempt.status], timeout=KILLED)
                raise
        if status == TRY_AGAIN:
            raise ServiceLost(f"job {job} could not report to {client.url}")
        if status != 0:
            await _fail(client, started, _death(status))

    return app


async def _status_of(attempt: Running, app: App, worker: int | None, stop: asyncio.Event) -> int:
    """How it has ended; it is asked to when the worker stops, whose queue sends no heartbeats any more then."""
    if not await _stopped_before(stop, asyncio.wait([attempt.status])):
        return attempt.status.result()
    attempt.terminate()
    while worker is not None and not attempt.status.done():
        with suppress(ConnectorException):
            await app.job_manager.update_heartbeat(worker)
        await asyncio.wait([attempt.status], timeout=HEARTBEAT)
    return await attempt.status


def _death(status: int) -> FailureReport:
    """What is known of a process that has ended without a word."""
    if status < 0 or status in (NOT_FORKED, HOST_ENDED):
        if status == NOT_FORKED:
            message = "no process could be started for the attempt; see the worker's log"
        elif status == HOST_ENDED:
            message = "the process that holds the base model has ended, and the attempt with it"
        else:
            message = f"the training process was ended by signal {signal.Signals(-status).name}"
        if status in (HOST_ENDED, -signal.SIGKILL):
            message += ", often the system's answer when memory runs out"
        return FailureReport(reason="killed", message=message)
    message = f"the training process ended with exit status {status}; see the worker's log"
    return FailureReport(reason="crashed", message=message)


async def _fail(client: AsyncClient, started: AttemptStarted, failure: FailureReport) -> None:
    """Speaks for an attempt that cannot."""
    log.warning("attempt died", job=str(started.job), attempt=started.number, message=failure.message)
    with suppress(JobFinished, StaleAttempt):  # it had reported, or was given up
        await client.jobs.fail(started.job, started.number, failure)


# --- Processes and patience ------------------------------------------------------------------------------------------


class Described(NamedTuple):
    report: WorkerReport
    slots: Sequence[tuple[str, ...]]  #: devices such as cuda:0, of one attempt each; at least one


async def _warm_up(processes: ForkServerContext, settings: Settings) -> Described:
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
    return Described(*receiving.recv())


def _describe(settings: Settings, connection: Connection) -> None:
    from tpv_worker.capabilities import capabilities, slots  # preloaded where this runs

    connection.send((capabilities(settings), slots(settings.device, settings.processes)))


async def _stopped_before(stop: asyncio.Event, work: Coroutine[Any, Any, object]) -> bool:
    """Waits for the work to end or for `stop`; whether `stop` came first. Work that has not ended is cancelled.

    What the work raises is raised here, unless `stop` came first.
    """
    working, stopping = asyncio.create_task(work), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([working, stopping], return_when=asyncio.FIRST_COMPLETED)
    finally:
        working.cancel()
        stopping.cancel()
    if not stop.is_set():
        working.result()
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
