"""`tpv up` as a process of its own, in a directory that the Postgres user can reach."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import psutil
import pytest
from tests.worker.conftest import _one_thread, model_paths  # noqa: F401 # fixtures, for the tests here too

_READY = 120.0  # seconds for `tpv up` to get ready on a busy machine, making a new database included


class Up:
    """A running `tpv up`; as a context manager it is stopped in the end, if it still runs then."""

    def __init__(
        self,
        data_dir: Path,
        *,
        workers: int = 0,
        port: int = 0,
        model_directory: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Returns when the service is ready. `environment` is added to the present one."""
        started = time.monotonic()
        args = ["up", "--data-dir", str(data_dir), "--port", str(port), "--workers", str(workers)]
        if model_directory:
            args += ["--model-directory", str(model_directory)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tpv.cli.main", *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        assert self.process.stdout
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=_read, args=(self.process.stdout, self._lines))
        self._reader.start()
        try:
            self.url = self.wait_for("ready at ", _READY).split()[-1]
        except BaseException:
            self.stop()
            raise
        self.seconds = time.monotonic() - started  #: from the command to the line that says it is ready

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """The next line of its output that has this text."""
        deadline = time.monotonic() + seconds
        seen: list[str] = []
        while True:
            try:
                line = self._lines.get(timeout=max(0.01, deadline - time.monotonic()))
            except queue.Empty:
                line = None
            assert line is not None, f"no {text!r} came, but: {seen}"
            if text in line:
                return line
            seen.append(line)

    def family(self) -> list[psutil.Process]:
        """All processes below `tpv up`."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def child(self, *words: str) -> psutil.Process:
        """The child whose command line has these words."""
        (found,) = [
            child
            for child in psutil.Process(self.process.pid).children()
            if all(any(word in part for part in child.cmdline()) for word in words)
        ]
        return found

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.end()

    def end(self) -> int:
        """Waits for it to end; gives its exit status."""
        self.process.wait(30)
        self._reader.join(30)
        assert self.process.stdout
        self.process.stdout.close()
        return self.process.returncode


def _read(stream: IO[str], lines: queue.SimpleQueue[str | None]) -> None:
    for line in stream:
        lines.put(line.rstrip())
    lines.put(None)


@contextmanager
def reachable_directory() -> Iterator[Path]:
    """An empty directory that the Postgres user can pass through; pytest's own `tmp_path` is private to us."""
    with tempfile.TemporaryDirectory(prefix="tpv-") as directory:
        if os.geteuid() == 0:
            Path(directory).chmod(0o711)
        yield Path(directory)


@pytest.fixture
def place() -> Iterator[Path]:
    with reachable_directory() as directory:
        yield directory


@pytest.fixture
def up(place: Path) -> Iterator[Callable[..., Up]]:
    """Starts `tpv up` over a data directory of this test: `up()`, `up("other", workers=1)`."""
    with ExitStack() as running:

        def start(name: str = "data", **options: Any) -> Up:
            return running.enter_context(Up(place / name, **options))

        yield start
