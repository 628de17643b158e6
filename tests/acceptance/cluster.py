"""A registry of real processes, each of which a test may kill, freeze and start again: as an operator has them."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
import numpy as np
import psutil
from tests.acceptance.conftest import reachable_directory
from tests.service.object_store import ACCESS_KEY, SECRET_KEY, ObjectStore

from tpv import Client, Retries
from tpv_service.embedded.postgres import Postgres, temporary_postgres

STALLED_AFTER = 12  #: seconds; heartbeats come every 5
CHECKPOINT_EVERY = 0.3  #: seconds
PATIENCE = 90.0  #: seconds, for anything on a busy machine
LABELS = ["yes", "no"]


def eventually(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def gone(process: psutil.Process) -> bool:
    """Whether it has ended; somebody else may not have asked for its exit status yet."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def rows(word: int, count: int) -> list[dict[str, str]]:
    """The answer is `yes` where the text holds a certain word."""
    draws = np.random.default_rng(word)
    texts = [[f"w{n}" for n in draws.integers(10, 40, 1 + i % 5)] for i in range(count)]
    return [
        {"source": " ".join([f"w{word}", *text] if i % 2 else text), "target": "yes" if i % 2 else "no"}
        for i, text in enumerate(texts)
    ]


class Process:
    """A command of `tpv` that goes on, and all that it has started."""

    def __init__(self, name: str, command: list[str], environment: Mapping[str, str], log: Path) -> None:
        self.name, self.command, self.environment, self.log = name, command, environment, log
        self.process: subprocess.Popen[bytes] | None = None
        self.started: set[psutil.Process] = set()  #: every process below it that was ever seen

    def start(self, **changes: str) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tpv.cli.main", *self.command],
                env={**self.environment, **changes},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def family(self) -> list[psutil.Process]:
        """It and all processes below it."""
        with suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.pid)
            found = [parent, *parent.children(recursive=True)]
            self.started |= {*found}
            return found
        return []

    def attempts(self) -> list[psutil.Process]:
        """The processes that train: below a fork server and the host of a model."""
        found = []
        with suppress(psutil.NoSuchProcess):
            for server in psutil.Process(self.pid).children():
                for host in server.children():
                    found += host.children()
        return found

    def kill(self) -> None:
        """It alone; what it has started has to notice."""
        self.family()
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def send(self, number: signal.Signals) -> None:
        """To it and everything below it, as when its machine is suspended."""
        for process in self.family():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.send(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


class Cluster:
    """PostgreSQL, an S3 server, the API, and workers that the test starts."""

    def __init__(
        self, place: Path, postgres: Postgres, store: ObjectStore, models: Path, workers: Sequence[str], queues: str
    ) -> None:
        self.postgres, self.store = postgres, store
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        environment = {
            **os.environ,
            "TPV_DATABASE_URL": postgres.url,
            "TPV_S3_ENDPOINT": store.endpoint,
            "TPV_S3_ACCESS_KEY": ACCESS_KEY,
            "TPV_S3_SECRET_KEY": SECRET_KEY,
            "TPV_S3_SECURE": "false",
            "TPV_AUTHENTICATION": "false",
            "TPV_PORT": self.url.rsplit(":", 1)[1],
            "TPV_URL": self.url,
            "TPV_STALLED_AFTER": f"PT{STALLED_AFTER}S",
            "TPV_STALLED_CHECK": "PT1S",
            "TPV_RETRY_PAUSE": "PT0.2S",
            "TPV_CHECKPOINT_EVERY": f"PT{CHECKPOINT_EVERY}S",
            "TPV_THREADS": "1",
            "TPV_DATA_CACHE": str(place / "cache"),
            "TPV_MODEL_DIRECTORIES": str(models),
        }
        self.api = Process("api", ["serve"], environment, place / "api.log")
        self.workers = [
            Process(name, ["worker", "--name", name, "--queues", queues], environment, place / f"{name}.log")
            for name in workers
        ]
        subprocess.run(
            [sys.executable, "-m", "tpv.cli.main", "db", "upgrade"], env=environment, check=True, capture_output=True
        )
        environment["TPV_QUEUE_URL"] = postgres.worker_url()
        # Whoever is at work waits for a service that is started again.
        self.client = Client(self.url, retries=Retries(times=60, longest=1.0))

    @property
    def processes(self) -> list[Process]:
        return [*self.workers, self.api]

    def start_api(self, **changes: str) -> None:
        self.api.start(**changes)
        eventually(self._is_ready)

    def _is_ready(self) -> bool:
        with suppress(httpx.HTTPError):
            return httpx.get(f"{self.url}/readyz").status_code == 200
        return False

    def kill_postgres(self) -> None:
        """The postmaster, by kill -9: its backends notice."""
        assert self.postgres.pid is not None
        os.kill(self.postgres.pid, signal.SIGKILL)
        eventually(lambda: self.postgres.pid is None)

    def start_postgres(self) -> None:
        self.postgres.stop()  # what is left of it
        self.postgres.start()

    @contextmanager
    def full_disk(self) -> Iterator[None]:
        """No file of more than 1 kB can be written to the store."""
        assert self.store.process is not None
        limits = resource.prlimit(self.store.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(self.store.process.pid, resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            yield
        finally:
            resource.prlimit(self.store.process.pid, resource.RLIMIT_FSIZE, limits)

    @contextmanager
    def another(self, name: str, *options: str) -> Iterator[Process]:
        """A worker that is there for a while."""
        command, log = ["worker", "--name", name, *options], self.api.log.with_name(f"{name}.log")
        worker = Process(name, command, self.api.environment, log)
        worker.start()
        try:
            yield worker
        finally:
            worker.stop()

    def worker_of(self, job: str) -> Process | None:
        """Who works on a job now."""
        names = [attempt.worker for attempt in self.client.jobs.get(job).attempts if attempt.state == "running"]
        return next((worker for worker in self.workers if [worker.name] == names), None)

    def stop(self) -> None:
        self.client.close()
        for process in self.processes:
            process.family()
            process.stop()

    def orphans(self) -> list[psutil.Process]:
        """Processes that were ever seen below ours, and live on."""
        return [process for own in self.processes for process in own.started if not gone(process)]


@contextmanager
def cluster(models: Path, workers: Sequence[str] = ("one", "two"), queues: str = "") -> Iterator[Cluster]:
    """All but the workers is ready. `models` is the directory of those that jobs may name, `queues` none: every one."""
    with ExitStack() as stack:
        place = stack.enter_context(reachable_directory())
        # Durable: without synchronous commits, what was acknowledged would not survive a kill.
        postgres = stack.enter_context(temporary_postgres(durable=True))
        store = stack.enter_context(ObjectStore(place / "store"))
        made = Cluster(place, postgres, store, models, workers, queues)
        stack.callback(made.stop)
        made.start_api()
        try:
            yield made
        except BaseException:
            for process in made.processes:
                if process.log.exists():
                    sys.stderr.write(f"--- {process.name}\n{process.log.read_text()[-6000:]}\n")
            raise
