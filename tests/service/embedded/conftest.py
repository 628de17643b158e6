import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest


@pytest.fixture
def place() -> Iterator[Path]:
    """An empty directory that the Postgres user can pass through; pytest's own `tmp_path` is private to us."""
    with tempfile.TemporaryDirectory(prefix="tpv-") as directory:
        if os.geteuid() == 0:
            Path(directory).chmod(0o711)
        yield Path(directory)


@pytest.fixture
def alive_after() -> Callable[[float, list[psutil.Process]], list[psutil.Process]]:
    """Those that still run after so many seconds; a zombie does not, it waits for an init process."""

    def wait(seconds: float, processes: list[psutil.Process]) -> list[psutil.Process]:
        _, left = psutil.wait_procs(processes, timeout=seconds)
        return [process for process in left if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]

    return wait
