"""A registry to measure: a durable PostgreSQL, a directory, and the service as a process of its own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import psycopg
from benchmarks.fill import fill, vectors
from benchmarks.registry import serving
from numpy.typing import NDArray

import tpv
from tpv_service import migrate
from tpv_service.embedded.postgres import temporary_postgres


@contextmanager
def registry(**settings: str) -> Iterator[Served]:
    """A client of a new, empty registry. Settings are those of the service, without `TPV_`."""
    with temporary_postgres(durable=True) as postgres, tempfile.TemporaryDirectory() as directory:
        migrate.upgrade(postgres.url.replace("postgresql://", "postgresql+psycopg://"))
        environment = {
            "TPV_DATABASE_URL": postgres.url,
            "TPV_AUTHENTICATION": "false",
            "TPV_BLOB_DIRECTORY": f"{directory}/blobs",
            "TPV_CACHE_DIRECTORY": f"{directory}/cache",
            **{f"TPV_{name.upper()}": value for name, value in settings.items()},
        }
        with serving(["-m", "tpv_service.server"], environment) as http, Served(str(http.base_url)) as client:
            client.database_url = postgres.url
            yield client


class Served(tpv.Client):
    database_url: str


def filled(client: Served, name: str, count: int, width: int, distribution: str = "clustered") -> NDArray[np.float32]:
    """Registers `count` vectors as a new initialization's family; gives them, (count, width)."""
    start = np.zeros((1, width), np.float32)
    client.initializations.create(name, base_model=f"model-{name}", unpinned=True, tensor=start)
    fill(client, name, vectors(count, width, distribution), shown=False)
    with psycopg.connect(client.database_url, autocommit=True) as connection:
        connection.execute("vacuum analyze")  # which autovacuum would do within a minute
        connection.execute("checkpoint")
    os.sync()  # else the kernel writes back what filling has left half a minute later, and a registration's fsync waits
    return np.concatenate(list(vectors(count, width, distribution)))
