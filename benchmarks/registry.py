"""Registrations and downloads per second, against a floor that does the least that could be called the same.

    python benchmarks/registry.py [--requests 200]

The floor of a registration is an empty FastAPI route: one multipart upload of equal size, one sha256, one fsynced write
(S3: one put), one commit. The floor of a download is a plain file response with a sha256 of the file (S3: one get).
Both servers run beside each other on one database server; requests alternate between them, so that whatever else the
machine does meets both. Vectors are 100 x 768 float32, 300 KB.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import numpy as np

from tpv import files
from tpv_service import migrate
from tpv_service.embedded.postgres import temporary_postgres

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.service.object_store import ACCESS_KEY, SECRET_KEY, ObjectStore

SHAPE = (100, 768)
FLOOR = Path(__file__).with_name("registry_floor.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=200, help="of each kind, to each server")
    requests = parser.parse_args().requests
    print(f"{'':34}{'ours/s':>9}{'floor/s':>9}{'ours ms':>9}{'floor ms':>10}{'ratio':>8}")
    with temporary_postgres(durable=True) as postgres, tempfile.TemporaryDirectory() as directory:
        migrate.upgrade(postgres.url.replace("postgresql://", "postgresql+psycopg://"))
        for store in ("directory", "s3"):
            with ExitStack() as stack:
                settings = {"TPV_DATABASE_URL": postgres.url, "TPV_AUTHENTICATION": "false"}
                if store == "directory":
                    settings["TPV_BLOB_DIRECTORY"] = f"{directory}/blobs"
                else:
                    server = stack.enter_context(ObjectStore(Path(directory) / "objects"))
                    settings |= {
                        "TPV_S3_ENDPOINT": server.endpoint,
                        "TPV_S3_ACCESS_KEY": ACCESS_KEY,
                        "TPV_S3_SECRET_KEY": SECRET_KEY,
                        "TPV_S3_SECURE": "false",
                    }
                ours = stack.enter_context(serving(["-m", "tpv_service.server"], settings))
                floor = stack.enter_context(serving([str(FLOOR)], settings))
                measure(store, ours, floor, requests)


@contextmanager
def serving(module: list[str], settings: dict[str, str]) -> Iterator[httpx.Client]:
    """A server as a process of its own, on a socket that this process binds; gives a client to it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        descriptor = listener.fileno()
        process = subprocess.Popen(
            [sys.executable, *module, str(descriptor)],
            env=os.environ | settings,
            pass_fds=[descriptor],
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
    try:
        with httpx.Client(base_url=url, timeout=60) as client:
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                try:
                    if client.get("/readyz").status_code == 200:
                        break
                except httpx.TransportError:
                    time.sleep(0.05)
            yield client
    finally:
        process.terminate()
        process.wait()


def measure(store: str, ours: httpx.Client, floor: httpx.Client, requests: int) -> None:
    start = np.zeros(SHAPE, dtype=np.float32)
    ours.post(
        "/api/v1/initializations",
        data={"metadata": f'{{"name": "{store}", "base_model": {{"id": "m-{store}", "unpinned": true}}}}'},
        files={"file": files.dump({"prompt": start})},
    ).raise_for_status()
    random = np.random.default_rng(0)
    uploads = iter(
        [files.dump({"vector": random.normal(size=SHAPE).astype(np.float32)}) for _ in range(2 * (2 * requests + 20))]
    )

    def register() -> None:
        ours.post(
            f"/api/v1/vectors/default/v-{store}/versions",
            data={"metadata": f'{{"initialization": "{store}"}}'},
            files={"file": next(uploads)},
        ).raise_for_status()

    def put() -> None:
        floor.post("/files", data={"metadata": "{}"}, files={"file": next(uploads)}).raise_for_status()

    def download() -> None:
        content = ours.get(f"/api/v1/vectors/default/v-{store}/versions/1/content").raise_for_status().content
        hashlib.sha256(content).digest()

    def get() -> None:
        hashlib.sha256(floor.get("/files/newest").raise_for_status().content).digest()

    for name, one, other in (("registration", register, put), ("download", download, get)):
        for _ in range(10):  # warm-up
            one(), other()
        times = [(seconds(one), seconds(other)) for _ in range(requests)]
        show(f"{store}, {name}, 1 client", *(statistics.median(side) for side in zip(*times, strict=True)), 1)
        show(f"{store}, {name}, 8 clients", throughput(one, requests), throughput(other, requests), 8)


def seconds(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def throughput(call: Callable[[], None], requests: int) -> float:
    """Seconds of one request when eight clients ask at a time."""
    with ThreadPoolExecutor(8) as pool:
        began = time.perf_counter()
        list(pool.map(lambda _: call(), range(requests // 2)))
        return (time.perf_counter() - began) / (requests // 2) * 8


def show(name: str, ours: float, floor: float, clients: int) -> None:
    rates = f"{clients / ours:9.0f}{clients / floor:9.0f}"
    print(f"{name:34}{rates}{ours * 1e3:9.2f}{floor * 1e3:10.2f}{ours / floor:8.2f}", flush=True)


if __name__ == "__main__":
    main()
