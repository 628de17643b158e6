import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def place() -> Iterator[Path]:
    """An empty directory that the Postgres user can pass through; pytest's own `tmp_path` is private to us."""
    with tempfile.TemporaryDirectory(prefix="tpv-") as directory:
        if os.geteuid() == 0:
            Path(directory).chmod(0o711)
        yield Path(directory)
