"""Attempts and the hosts that they are forked from, as real processes."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import resource
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import closing
from typing import Any
from uuid import uuid4

import psutil
import pytest
from tests.worker.registry import Answer, problem, registry

from tpv.schemas.initializations import BaseModelReference
from tpv.schemas.jobs import AttemptStarted, JobSpec
from tpv_worker.hosts import Hosts, Running
from tpv_worker.settings import Settings
from tpv_worker.worker import PRELOAD, _death

pytestmark = pytest.mark.slow  # a fork server that imports torch


@pytest.fixture
def held() -> Iterator[tuple[str, threading.Event]]:
    """The address of a service that keeps every attempt waiting which tells how it ended, until the event is set."""
    let_go = threading.Event()

    def answer(what: str, body: Any) -> Answer:
        if what == "failure":
            let_go.wait(60)
        return problem("job-finished", 409)

    with registry(answer) as service:
        yield service.url, let_go
        let_go.set()


def start(hosts: Hosts, *, processes: int = 1) -> Running:
    """An attempt with a model that its worker may not read: it fails at once, and tells so."""
    model = BaseModelReference.model_construct(id="/not/allowed", revision=None)
    spec = JobSpec.model_construct(method="prompt-tuning", options={}, output=None, base_model=model)
    return hosts.start(
        AttemptStarted.model_construct(job=uuid4(), number=1, spec=spec, checkpoints=[]), ["cpu"] * processes
    )


def run(url: str, work: Callable[[Hosts], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        processes = multiprocessing.get_context("forkserver")
        processes.set_forkserver_preload(PRELOAD)
        with closing(Hosts(processes, Settings(url=url, queue_url="postgresql://"))) as hosts:
            await asyncio.wait_for(work(hosts), 120)

    asyncio.run(main())


async def forked(attempt: Running) -> int:
    """The id of its process, once there is one."""
    while attempt.pid is None:
        assert not attempt.status.done()
        await asyncio.sleep(0.02)
    return attempt.pid


def test_an_attempt_that_cannot_be_forked_takes_no_other_one_along(held: tuple[str, threading.Event]) -> None:
    url, let_go = held

    async def work(hosts: Hosts) -> None:
        first = start(hosts)
        host = psutil.Process(await forked(first)).ppid()
        limits = resource.prlimit(host, resource.RLIMIT_NOFILE, (3, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        second = start(hosts)
        status = await second.status
        resource.prlimit(host, resource.RLIMIT_NOFILE, limits)
        assert (_death(status).reason, second.pid) == ("killed", None)
        assert "no process could be started for the attempt" in _death(status).message
        third = start(hosts)
        assert psutil.Process(await forked(third)).ppid() == host
        assert not first.status.done()
        let_go.set()
        assert [await first.status, await third.status] == [0, 0]

    run(url, work)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT])
def test_the_end_of_a_host_is_no_fault_of_its_attempts(number: int, held: tuple[str, threading.Event]) -> None:
    url, let_go = held

    async def work(hosts: Hosts) -> None:
        attempt = start(hosts)
        process = psutil.Process(await forked(attempt))
        os.kill(process.ppid(), number)
        death = _death(await attempt.status)
        assert death.reason == "killed"
        assert "the process that holds the base model has ended" in death.message
        await asyncio.to_thread(psutil.wait_procs, [process], 60)
        assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
        let_go.set()
        assert await start(hosts).status == 0  # by a new one

    run(url, work)


def test_an_attempt_is_killed_before_it_has_a_process_and_after(held: tuple[str, threading.Event]) -> None:
    url, _ = held

    async def work(hosts: Hosts) -> None:
        early = start(hosts)
        early.kill()
        await early.status
        late = start(hosts)
        await forked(late)
        late.kill()
        assert await late.status == -signal.SIGKILL

    run(url, work)


@pytest.mark.parametrize("dies", ["the first", "another"])
def test_the_processes_of_an_attempt_end_together(dies: str, held: tuple[str, threading.Event]) -> None:
    url, _ = held

    async def work(hosts: Hosts) -> None:
        attempt = start(hosts, processes=3)
        first = psutil.Process(await forked(attempt))
        team = psutil.Process(first.ppid()).children()
        assert len(team) == 3
        (first if dies == "the first" else next(process for process in team if process != first)).kill()
        assert await attempt.status == -signal.SIGKILL
        assert not any(process.is_running() for process in team)  # and hold no memory of a device

    run(url, work)


def test_a_failure_of_all_processes_is_told_by_the_first_one() -> None:
    with registry(lambda what, body: problem("job-finished", 409)) as service:

        async def work(hosts: Hosts) -> None:
            assert await start(hosts, processes=3).status == 0

        run(service.url, work)
        assert [failure["reason"] for failure in service.bodies("failure")] == ["model"]
