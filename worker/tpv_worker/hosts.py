"""Processes that hold a base model, and the attempts that are forked from them and share its weights.

    worker ─── fork server, with torch ─┬─ host of one model ─┬─ attempt
                                        │                     └─ attempt
                                        └─ host of another one ─── attempt

A host loads its model once, on the CPU, and forks a process for each attempt: this takes milliseconds, and memory that
nobody writes to is there once, whatever the number of attempts. An attempt on several GPUs has a process for each
(`tpv_worker.parallel`); the first one is the attempt, the others work with it. Neither the fork server nor a host ever
touches CUDA: a forked process could not use it any more. None of them outlives the worker: their pipe to it closes when
it ends.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import signal
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory

from tpv import Client
from tpv.schemas.jobs import AttemptStarted
from tpv_worker.settings import Settings

# Exit statuses of attempts that no process of their own has given.
NOT_FORKED = os.EX_OSERR  #: none could be started
HOST_ENDED = os.EX_SOFTWARE  #: their host ended, and took them along


class Running:
    """The process of an attempt, as the worker sees it."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.pid: int | None = None  #: None until it is forked, which waits for the model
        #: As `Process.exitcode`, or one of the above.
        self.status: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._signals: list[signal.Signals] = []

    def terminate(self) -> None:
        """Asks it to end after its step."""
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """Ends it now; it takes its host along while that loads a model for it alone."""
        if self.pid is None and not self.status.done() and self.host.attempts == [self]:
            self.host.process.kill()
        self._send(signal.SIGKILL)

    def forked(self, pid: int) -> None:
        self.pid = pid
        for number in self._signals:
            self._send(number)

    def _send(self, number: signal.Signals) -> None:
        if self.pid is None:
            self._signals.append(number)
        elif not self.status.done():
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)


class Hosts:
    """The hosts of a worker: one for each model that is at work, and the last one that was."""

    def __init__(self, processes: ForkServerContext, settings: Settings) -> None:
        self.processes, self.settings = processes, settings
        # Where the processes of an attempt meet; they may end after it has gone.
        self._directory = TemporaryDirectory(prefix="tpv-worker-", ignore_cleanup_errors=True)
        self._hosts: dict[tuple[str, str | None], Host] = {}  # by id and revision of the model

    def start(self, started: AttemptStarted, devices: Sequence[str]) -> Running:
        """Begins an attempt, with a process for each device; its model is loaded first, unless a host has it."""
        model = started.spec.base_model.id, started.spec.base_model.revision
        host = self._hosts.get(model)
        if host is None or host.gone:
            for other in [name for name, host in self._hosts.items() if not host.attempts]:
                self._hosts.pop(other).close()
            host = self._hosts[model] = Host(self.processes, self.settings, Path(self._directory.name))
        return host.start(started, devices)

    def close(self) -> None:
        for host in self._hosts.values():
            host.close()
        self._hosts.clear()
        self._directory.cleanup()


class Host:
    """The worker's side of one host."""

    def __init__(self, processes: ForkServerContext, settings: Settings, directory: Path) -> None:
        self.attempts: list[Running] = []
        self.gone = False
        self._connection, theirs = processes.Pipe()
        self.process = processes.Process(target=_serve, args=(settings, theirs, directory))
        self.process.start()
        theirs.close()
        asyncio.get_running_loop().add_reader(self._connection.fileno(), self._read)
        self._places: dict[int, Running] = {}  # by the number that messages carry
        self._count = 0

    def start(self, started: AttemptStarted, devices: Sequence[str]) -> Running:
        running = Running(self)
        self._count += 1
        self._places[self._count] = running
        self.attempts.append(running)
        try:
            self._connection.send((self._count, started, devices))
        except OSError:
            self._end()
        return running

    def close(self) -> None:
        """The host ends with its pipe, and its attempts with it."""
        if not self.gone:
            self._end()

    def _read(self) -> None:
        try:
            number, pid, status = self._connection.recv()
        except (EOFError, OSError):
            self._end()
            return
        if status is None:
            self._places[number].forked(pid)
        else:
            self._ended(self._places.pop(number), status)

    def _end(self) -> None:
        self.gone = True
        asyncio.get_running_loop().remove_reader(self._connection.fileno())
        self._connection.close()
        self.process.kill()  # if it has not ended: closed is closed
        self.process.join()
        for running in [*self._places.values()]:
            self._ended(running, HOST_ENDED)
        self._places.clear()

    def _ended(self, running: Running, status: int) -> None:
        self.attempts.remove(running)
        if not running.status.done():
            running.status.set_result(status)


# --- In the host -----------------------------------------------------------------------------------------------------


@dataclass
class Team:
    """The processes of one attempt. When one fails, or the first one has ended, the others are ended with it."""

    number: int  #: that messages carry
    meeting: Path  #: the file by which they find each other
    running: list[BaseProcess] = field(default_factory=list)
    first: int | None = None  #: process id; None until all are forked
    status: int | None = None  #: of the attempt, once that is known

    def ended(self, process: BaseProcess) -> None:
        """The first one ends when the attempt has, whatever came of it; another one well only if its work is done."""
        self.running.remove(process)
        if process.exitcode != 0 or process.pid == self.first:
            assert process.exitcode is not None
            self.end(process.exitcode)

    def end(self, status: int) -> None:
        """The attempt has this status, if it had none; what still runs is killed."""
        self.status = status if self.status is None else self.status
        for process in self.running:
            process.kill()


def _serve(settings: Settings, connection: Connection, directory: Path) -> None:
    """Forks an attempt for each message, and tells how it ends; until the worker closes the pipe."""
    from tpv_worker.attempt import run_attempt  # preloaded where this runs, as what follows
    from tpv_worker.base_model import LoadedModel
    from tpv_worker.parallel import Place

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # sent to a whole group of processes, both are for the worker
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # an attempt gets it as soon as it listens
    Client(settings.url).close()  # the certificates that it reads, 0.1 s, are then there for every attempt
    forks = multiprocessing.get_context("fork")
    model = LoadedModel(settings)
    running: dict[int, tuple[Team, BaseProcess]] = {}  # by what a process makes ready when it ends

    def attempt(started: AttemptStarted, device: str, place: Place) -> None:
        connection.close()
        run_attempt(settings.model_copy(update={"device": device}), started, model, place)

    def fork(team: Team, started: AttemptStarted, devices: Sequence[str]) -> None:
        directory.mkdir(mode=0o700, exist_ok=True)  # who clears old files away may have taken it for one
        for rank, device in enumerate(devices):
            place = Place(rank, len(devices), str(team.meeting))
            process = forks.Process(target=attempt, args=(started, device, place), daemon=True)
            process.start()
            team.running.append(process)
            running[process.sentinel] = team, process
        team.first = team.running[0].pid

    def tell(team: Team) -> None:
        """The worker hears of the end when all have ended: until then they hold memory of their devices."""
        if not team.running:
            with suppress(OSError):
                team.meeting.unlink()
            connection.send((team.number, team.first, team.status))

    while True:
        for ready in wait([connection, *running]):
            if ready is connection:
                try:
                    number, started, devices = connection.recv()
                except EOFError:
                    for _, process in running.values():
                        process.kill()
                    os._exit(0)
                model.load(started.spec.base_model)
                gc.freeze()  # else the collector would write to the memory that is shared
                team = Team(number, directory / f"{os.getpid()}-{number}")
                try:
                    fork(team, started, devices)
                except OSError:  # too many processes, or no memory for one more: those that are there go on
                    traceback.print_exc()
                    team.end(NOT_FORKED)
                    tell(team)
                else:
                    connection.send((number, team.first, None))
            else:
                assert isinstance(ready, int)
                team, process = running.pop(ready)
                process.join()
                team.ended(process)
                tell(team)
