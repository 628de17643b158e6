"""What the worker process decides by itself."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Self, cast
from uuid import uuid4

import httpx
import pytest
import torch
from procrastinate.testing import InMemoryConnector
from structlog.testing import capture_logs
from tests.worker.registry import Answer, problem, registry

from tpv import AsyncClient
from tpv.errors import Forbidden, Unauthorized
from tpv_worker.capabilities import devices, slots
from tpv_worker.hosts import Hosts
from tpv_worker.settings import Settings
from tpv_worker.worker import TASK, Slots, Stop, _death, create_app, run_worker

JOB = str(uuid4())
STARTED: Answer = (
    200,
    {
        "job": JOB,
        "number": 1,
        "spec": {"method": "initialize", "options": {}, "output": None, "base_model": {"id": "a", "unpinned": True}},
    },
)
WORKER: dict[str, Any] = {
    "name": "w", "state": "ready", "device": "cpu", "memory": None, "dtypes": [], "models": [], "concurrency": 1,
    "queues": None, "versions": {}, "jobs": [], "actor": "a", "created_at": "2026-01-02T03:04:05Z",
    "last_seen": "2026-01-02T03:04:05Z",
}  # fmt: skip


class Stubborn:
    """An attempt that goes on until it is killed, and takes its time then."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.status: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def terminate(self) -> None: ...

    def kill(self) -> None:
        asyncio.get_running_loop().call_later(self.seconds, self.status.set_result, -9)


class Worker:
    """A worker whose queue is in memory, and whose attempts are no processes."""

    def __init__(self, answer: Answer, ending: float = 0.0) -> None:
        self.stop, self.slots, self.ending = Stop(), Slots([("cuda:0",), ("cuda:1",)], None), ending
        self.begun: asyncio.Future[Stubborn] = asyncio.get_running_loop().create_future()
        settings = Settings(url="http://service", queue_url="postgresql://", name="w")
        transport = httpx.MockTransport(lambda request: httpx.Response(answer[0], json=answer[1]))
        client = AsyncClient(settings.url, transport=transport)
        self.queue = InMemoryConnector()
        self.app = create_app(settings, client, cast("Hosts", self), self.slots, self.stop)

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Self]:
        with self.app.replace_connector(self.queue):
            async with self.app.open_async():
                yield self

    def start(self, started: Any, devices: Any) -> Stubborn:
        self.begun.set_result(Stubborn(self.ending))
        return self.begun.result()

    async def entry(self) -> int:
        return await self.app.configure_task(TASK).defer_async(job=JOB)

    async def work(self, **options: Any) -> None:
        await self.app.run_worker_async(install_signal_handlers=False, abort_job_polling_interval=0.02, **options)


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 30))


@pytest.mark.parametrize(
    ("answer", "error"), [(problem("unauthorized", 401), Unauthorized), (problem("forbidden", 403), Forbidden)]
)
def test_a_worker_whose_token_is_refused_takes_no_further_job(answer: Answer, error: type[Exception]) -> None:
    async def work() -> None:
        worker = Worker(answer)
        async with worker.opened():
            entry = await worker.entry()
            await worker.work(wait=False)
        assert worker.queue.jobs[entry]["status"] == "failed"  # by which the service sees that nobody does it
        assert worker.stop.is_set()
        assert isinstance(worker.stop.error, error)

    with capture_logs() as lines:
        run(work)
    assert [line["job"] for line in lines if line["log_level"] == "error"] == [JOB]


@pytest.mark.parametrize("kind", ["stale-attempt", "not-now", "job-finished"])
def test_why_a_job_is_not_started_is_logged(kind: str) -> None:
    async def work() -> None:
        worker = Worker(problem(kind, 409))
        async with worker.opened():
            entry = await worker.entry()
            await worker.work(wait=False)
        assert worker.queue.jobs[entry]["status"] == "succeeded"
        assert not worker.stop.is_set()

    with capture_logs() as lines:
        run(work)
    assert [(line["log_level"], line["job"], line["error"]) for line in lines] == [
        ("info", JOB, f"the service says {kind}")
    ]


def test_the_device_of_a_cancelled_attempt_is_free_when_its_process_has_ended() -> None:
    async def work() -> None:
        worker = Worker(STARTED, ending=0.5)
        async with worker.opened():
            entry = await worker.entry()
            working = asyncio.create_task(worker.work())
            attempt = await worker.begun
            await worker.app.job_manager.cancel_job_by_id_async(entry, abort=True)
            free: tuple[str, ...] = ("cuda:1",)
            while free == ("cuda:1",):
                ended = attempt.status.done()
                with worker.slots.take() as free:
                    pass
                await asyncio.sleep(0.01)
            assert ended
            working.cancel()
            await asyncio.wait([working])

    run(work)


@pytest.mark.slow  # a fork server that imports torch
@pytest.mark.parametrize("reports", [0, 2])
def test_a_worker_ends_when_its_token_is_or_becomes_invalid(reports: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At its first report, before it takes any job, or at a later one; here also the queue's database is away."""
    monkeypatch.setattr("tpv_worker.worker.REPORT", 0.05)
    said: list[str] = []

    def answer(what: str, body: Any) -> Answer:
        said.append(body.get("state", "ready"))
        return (200, WORKER) if len(said) <= reports else problem("unauthorized", 401)

    with registry(answer) as service:
        settings = Settings(url=service.url, queue_url="postgresql://127.0.0.1:1/none", name="w")
        with pytest.raises(Unauthorized):
            asyncio.run(asyncio.wait_for(run_worker(settings), 120))
    assert said == ["ready"] * (reports + 1)


def test_cuda_is_every_gpu_that_is_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices("cpu") == ["cpu"]
    assert devices("cuda:1") == ["cuda:1"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # torch's own look at CUDA_VISIBLE_DEVICES
    assert devices("cuda") == ["cuda:0", "cuda:1"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(RuntimeError, match="there is no GPU here"):
        devices("cuda")


def test_processes_that_train_together_have_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert slots("cuda", 1) == [("cuda:0",), ("cuda:1",), ("cuda:2",), ("cuda:3",)]
    assert slots("cuda", 2) == [("cuda:0", "cuda:1"), ("cuda:2", "cuda:3")]
    assert slots("cpu", 2) == [("cpu", "cpu")]
    with pytest.raises(RuntimeError, match="need 3 GPUs, or a multiple; 'cuda' is cuda:0, cuda:1, cuda:2, cuda:3"):
        slots("cuda", 3)
    with pytest.raises(RuntimeError, match="need 2 GPUs, or a multiple; 'cuda:1' is cuda:1"):
        slots("cuda:1", 2)


def test_each_device_has_one_attempt_at_a_time() -> None:
    slots = Slots([("cuda:0",), ("cuda:1",)], None)
    assert slots.count == 2
    with slots.take() as first:
        with slots.take() as second:
            assert (first, second) == (("cuda:0",), ("cuda:1",))
        with slots.take() as third:
            assert third == ("cuda:1",)
    with slots.take() as fourth:
        assert fourth == ("cuda:0",)


def test_more_attempts_are_spread_over_the_devices() -> None:
    slots = Slots([("cuda:0", "cuda:1"), ("cuda:2", "cuda:3")], 4)
    assert slots.count == 4
    with slots.take() as one, slots.take() as two, slots.take() as three, slots.take() as four:
        assert [one, two, three, four] == [("cuda:0", "cuda:1"), ("cuda:2", "cuda:3")] * 2


def test_no_more_is_said_of_a_death_than_is_known() -> None:
    assert _death(-9).message == (
        "the training process was ended by signal SIGKILL, often the system's answer when memory runs out"
    )
    assert _death(-11).message == "the training process was ended by signal SIGSEGV"
    assert [_death(status).reason for status in (-9, -11, 1)] == ["killed", "killed", "crashed"]
    assert [_death(status).reason for status in (os.EX_OSERR, os.EX_SOFTWARE)] == ["killed", "killed"]
