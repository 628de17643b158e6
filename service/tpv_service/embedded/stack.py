"""`tpv up`: one supervised tree of processes over one data directory.

tpv up ─┬─ guard                 ends the others when this process is gone, however it went
        ├─ postgres              DATA_DIR/postgres
        ├─ tpv_service.server    applies migrations, then is the API; blobs in DATA_DIR/blobs
        └─ tpv_worker            as many as asked for

DATA_DIR/up.lock                 held by the running `tpv up`: its pid and URL
DATA_DIR/log                     one log per child
"""

from __future__ import annotations

import errno
import fcntl
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self, TextIO
from urllib.parse import urlsplit

import platformdirs

from tpv_service.embedded import EmbeddedError
from tpv_service.embedded.postgres import Postgres, make_data_dir
from tpv_service.embedded.processes import ProcessGroup, bound_log, cores, last_line
from tpv_service.server import is_loopback, listen, url_of

_TICK = 0.2  # seconds between two looks at the children
_READY = 60.0  # seconds for the API to answer
_STABLE = 60.0  # seconds; a child that ran longer starts again after the shortest pause
_LONGEST_PAUSE = 30.0  # seconds between two starts of a child that keeps ending
_PATIENCE = 4.0  # seconds for the workers, and then for the API, to stop by themselves
_OLD_PORT = 6.0  # seconds; the API of a run that was killed holds its port until the guard ends it

# What `tpv up` decides itself. Other settings (TPV_UPLOAD_LIMIT ...) come from the environment, as everywhere.
_DECIDED_HERE = tuple(
    f"TPV_{name}"
    for name in (
        "DATABASE_URL",
        "BLOB_",
        "CACHE_",
        "S3_",
        "HOST",
        "PORT",
        "AUTHENTICATION",
        "INITIAL_",
        "TOKEN",
        "URL",
        "QUEUE_URL",
        "GRACE",
    )
)

Say = Callable[[str], None]  #: shows one line to the user


def default_data_dir() -> Path:
    """The user's data folder; as root a place that PostgreSQL's own user can reach, so outside home."""
    return Path("/var/lib/tpv") if os.geteuid() == 0 else platformdirs.user_data_path("tpv", appauthor=False)


def up(data_dir: Path, *, host: str, port: int, workers: int, model_directories: Sequence[Path], say: Say) -> None:
    """Runs everything until Ctrl-C or SIGTERM. Raises EmbeddedError when it cannot start or go on."""
    if not is_loopback(host):
        raise EmbeddedError(
            f"`tpv up` asks for no token, so it listens on loopback only, not on {host}; see `tpv serve`"
        )
    data_dir = data_dir.absolute()
    make_data_dir(data_dir)
    with (
        _locked(data_dir) as lock,
        _Signals() as signals,
        _listening(host, port, patience=_OLD_PORT if lock.read() else 0) as listener,
        ProcessGroup(data_dir / "log") as group,
        ExitStack() as at_end,
    ):
        url = url_of(listener)
        _write(lock, {"pid": os.getpid(), "url": url})
        postgres = Postgres(data_dir, group=group)
        at_end.callback(postgres.stop)
        postgres.prepare()
        api_settings = {
            "DATABASE_URL": postgres.url,
            "BLOB_DIRECTORY": str(data_dir / "blobs"),
            "CACHE_DIRECTORY": str(data_dir / "cache"),
            "AUTHENTICATION": "false",
        }
        api = _Child("api", ["tpv_service.server", str(listener.fileno())], api_settings, group, [listener.fileno()])
        worker_settings = {"URL": url, "GRACE": "PT3S"}  # less than _PATIENCE
        if model_directories:
            worker_settings["MODEL_DIRECTORIES"] = os.pathsep.join(str(path.resolve()) for path in model_directories)
        fleet = [_Child(f"worker-{n}", ["tpv_worker"], worker_settings, group) for n in range(1, workers + 1)]
        for child in fleet if workers > 1 else ():  # each takes all cores otherwise, and they wait for each other
            child.env.setdefault("OMP_NUM_THREADS", str(max(1, cores() // workers)))

        signals.children = [api, *fleet]
        try:
            api.start()  # first: its imports take longer than PostgreSQL, which it waits for
            postgres.start()
            _wait_until_ready(url, api)
            for child in fleet:
                child.env["TPV_QUEUE_URL"] = postgres.worker_url()  # of a role that the API's migrations allow in
            say(f"ready at {url}")
            _supervise(postgres, [api, *fleet], say)  # starts the workers: they are not in the way of getting ready
        finally:
            signals.ending = True
            _stop(fleet)
            _stop([api])


class _Child:
    """A Python module run as a program, and run again when it ends: after one second, then after ever longer pauses."""

    def __init__(
        self,
        name: str,
        module: Sequence[str],
        settings: dict[str, str],
        group: ProcessGroup,
        fds: Sequence[int] = (),
    ) -> None:
        self.name, self.group, self.fds = name, group, fds
        self.args = [sys.executable, "-P", "-m", *module]  # -P: no module of the current directory gets in between
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(_DECIDED_HERE)}
        self.env |= {"PYTHONUNBUFFERED": "1"} | {f"TPV_{name}": value for name, value in settings.items()}
        self.process: subprocess.Popen[bytes] | None = None
        self.due = 0.0  #: when to start, or when it was started
        self.pause = 0.0  #: seconds, of the last restart

    def start(self) -> None:
        self.due = time.monotonic()
        self.process = self.group.start(self.name, self.args, env=self.env, pass_fds=self.fds)

    def keep_running(self, say: Say) -> None:
        if self.process is None:
            if time.monotonic() >= self.due:
                self.start()
        elif (status := self.process.poll()) is not None:
            stable = time.monotonic() - self.due > _STABLE
            self.pause = 1.0 if stable else min(max(1.0, 2 * self.pause), _LONGEST_PAUSE)
            say(f"{self.name} ended (status {status}), starts again in {self.pause:.0f} s; see {self.log}")
            self.process, self.due = None, time.monotonic() + self.pause

    @property
    def log(self) -> Path:
        return self.group.log(self.name)


def _wait_until_ready(url: str, api: _Child) -> None:
    deadline = time.monotonic() + _READY
    while time.monotonic() < deadline:
        if api.process is None or api.process.poll() is not None:
            raise EmbeddedError(f"the API does not start: {last_line(api.log)} (more in {api.log})")
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=1)
        with suppress(OSError, http.client.HTTPException), closing(connection):
            connection.request("GET", "/readyz")
            if connection.getresponse().status == http.HTTPStatus.OK:
                return
        time.sleep(0.05)
    raise EmbeddedError(f"the API does not answer after {_READY:.0f} s; see {api.log}")


def _supervise(postgres: Postgres, children: Sequence[_Child], say: Say) -> None:
    """Keeps everything running until a signal comes. Raises EmbeddedError when PostgreSQL cannot be kept running."""
    restarted = -_STABLE
    while True:
        if postgres.pid is None:
            if time.monotonic() - restarted < _STABLE:
                raise EmbeddedError(f"PostgreSQL ended twice within a minute; see {postgres.data_dir}/log/postgres.log")
            say("PostgreSQL ended, starts again")
            postgres.start()
            restarted = time.monotonic()
        for child in children:
            child.keep_running(say)
            bound_log(child.log)
        time.sleep(_TICK)


def _stop(children: Sequence[_Child]) -> None:
    """Asks all at once, kills those that take too long."""
    running = [child.process for child in children if child.process]
    for process in running:
        process.terminate()
    deadline = time.monotonic() + _PATIENCE
    for process in running:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class _Signals:
    """The first signal is a KeyboardInterrupt where we are, and a good end. Another one kills API and workers."""

    def __init__(self) -> None:
        self.ending = False
        self.children: Sequence[_Child] = []

    def __enter__(self) -> Self:
        nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        numbers = [signal.SIGINT, signal.SIGTERM] if nohup else [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
        self._previous = {number: signal.signal(number, self._come) for number in numbers}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        return kind is KeyboardInterrupt

    def _come(self, number: int, frame: FrameType | None) -> None:
        if not self.ending:
            self.ending = True
            raise KeyboardInterrupt
        for child in self.children:
            if child.process:
                child.process.kill()


@contextmanager
def _locked(data_dir: Path) -> Iterator[TextIO]:
    """The lock of a data directory. The file's content is left by a run that did not end well, else empty."""
    path = data_dir / "up.lock"
    try:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+")  # children do not inherit it
    except OSError as error:
        raise EmbeddedError(f"cannot use the data directory {data_dir}: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            try:
                running = json.loads(file.read())
            except ValueError:
                running = {"pid": "?", "url": "a URL that it will print when it is ready"}
            raise EmbeddedError(
                f"`tpv up` already runs on {data_dir}: pid {running['pid']}, {running['url']}"
            ) from None
        try:
            yield file
        finally:
            file.truncate(0)


def _write(lock: TextIO, content: dict[str, object]) -> None:
    lock.seek(0)
    lock.truncate()
    json.dump(content, lock)
    lock.flush()


def _listening(host: str, port: int, *, patience: float) -> socket.socket:
    deadline = time.monotonic() + patience
    while True:
        try:
            return listen(host, port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise EmbeddedError(f"cannot listen on {host}, port {port}: {error.strerror}") from error
            if time.monotonic() > deadline:
                raise EmbeddedError(
                    f"port {port} is taken; choose another with --port, or 0 for any free one"
                ) from None
            time.sleep(0.1)
