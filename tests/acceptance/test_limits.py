"""Requests that are too large, sent over real connections to the API's own process."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

import numpy as np
import psutil
import pytest
from tests.acceptance.conftest import reachable_directory

from tpv import Client
from tpv.errors import InvalidTensor, TooLarge
from tpv_service.embedded.postgres import temporary_postgres

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

MB = 2**20
LIMIT = 64 * MB  # the default of TPV_UPLOAD_LIMIT
GB = 2**30
BUFFER = 32 * 1024  # asked for at both ends of a connection; Linux takes twice as much
VERSIONS = "/api/v1/vectors/default/mnli/versions"
PART = b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'


@dataclass(frozen=True)
class Server:
    """The API as `tpv up` starts it, with small receive buffers: what a client could send has been read."""

    port: int
    process: psutil.Process

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def peak(self) -> int:
        """The most memory that the process ever had, bytes; 0 where the system does not tell."""
        status = Path(f"/proc/{self.process.pid}/status")
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024 if status.exists() else 0


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with temporary_postgres() as postgres, reachable_directory() as place, socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)  # accepted connections inherit it
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        settings = {"DATABASE_URL": postgres.url, "BLOB_DIRECTORY": str(place / "blobs"), "AUTHENTICATION": "false"}
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TPV_")}
        process = subprocess.Popen(
            [sys.executable, "-m", "tpv_service.server", str(listener.fileno())],
            env=environment | {f"TPV_{name}": value for name, value in settings.items()},
            pass_fds=[listener.fileno()],
        )
        try:
            found = Server(listener.getsockname()[1], psutil.Process(process.pid))
            with Client(found.url) as client:
                assert eventually_ready(client)
                client.initializations.create(
                    "family", base_model="some/model", unpinned=True, tensor=np.ones((2, 3), dtype=np.float32)
                )
            yield found
        finally:
            process.terminate()
            process.wait(30)


def eventually_ready(client: Client) -> bool:
    for _ in range(600):
        if client.ready():
            return True
        time.sleep(0.1)
    return False


@dataclass(frozen=True, kw_only=True)
class Outcome:
    status: int
    type: str  #: of the content
    problem: dict[str, object]
    sent: int  #: bytes of the body, those in the buffers between client and server included


def send_endlessly(server: Server, path: str, *, chunked: bool) -> Outcome:
    """Posts a body of 1 GB, going on after the answer for as long as the server takes more."""
    framing = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {GB}"
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: multipart/form-data; boundary=b", framing]
    head = "\r\n".join([*lines, "", ""])
    piece = bytes(64 * 1024)
    first, following = (f"{len(part):x}\r\n".encode() + part + b"\r\n" for part in (PART, piece))
    if not chunked:
        first, following = PART, piece
    answer, sent, waiting = b"", 0, memoryview(first)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(head.encode())
        connection.setblocking(False)
        deadline = time.monotonic() + 120
        while sent + len(waiting) <= GB:
            assert time.monotonic() < deadline
            readable, writable, _ = select.select([connection], [connection], [], 30)
            assert readable or writable, f"neither read nor answered after {sent} bytes"
            try:
                if readable:
                    received = connection.recv(65536)
                    if not received:
                        break
                    answer += received
                if writable:
                    taken = connection.send(waiting)
                    sent, waiting = sent + taken, waiting[taken:] or memoryview(following)
            except (ConnectionResetError, BrokenPipeError):
                break
    start, _, content = answer.partition(b"\r\n\r\n")
    status, *headers = start.decode().split("\r\n")
    named = {name.lower(): value.strip() for name, _, value in (header.partition(":") for header in headers)}
    return Outcome(
        status=int(status.split()[1]),
        type=named["content-type"],
        problem=json.loads(content[: int(named["content-length"])]),
        sent=sent,
    )


@pytest.mark.parametrize(("chunked", "allowed"), [(False, 0), (True, LIMIT)], ids=["declared", "chunked"])
def test_a_body_of_1_gb_is_refused_after_reading_at_most_the_limit(server: Server, chunked: bool, allowed: int) -> None:
    """A declared one is refused before reading, a chunked one when the limit is reached; then no more is read."""
    before = server.peak()

    outcome = send_endlessly(server, VERSIONS, chunked=chunked)

    assert (outcome.status, outcome.type) == (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "application/problem+json")
    assert outcome.problem["type"] == "urn:tpv:problem:too-large"
    assert outcome.problem["limit"] == LIMIT
    assert outcome.sent <= allowed + MB
    assert server.peak() - before < 16 * MB  # the body does not pile up in memory
    assert is_healthy(server)


def test_a_body_that_nobody_asked_for_is_not_read_to_its_end_either(server: Server) -> None:
    """The answer comes before any of the body was looked at; an endless one would keep the server reading."""
    outcome = send_endlessly(server, "/api/v1/nothing/here", chunked=True)

    assert outcome.status == HTTPStatus.NOT_FOUND
    assert outcome.sent <= LIMIT + MB
    assert is_healthy(server)


def test_the_client_says_that_a_file_is_too_large(server: Server) -> None:
    """Also when the server ends the connection while the file is still being sent."""
    with Client(server.url) as client:
        for _ in range(5):
            with pytest.raises(TooLarge, match="TPV_UPLOAD_LIMIT") as caught:
                client.vectors.register("mnli", vector=np.ones((16, MB + 1), np.float32), initialization="family")
            assert caught.value.extra["limit"] == LIMIT
        assert is_healthy(server)


def test_a_body_just_below_the_limit_is_read(server: Server) -> None:
    """The limit refuses nothing that it should not: what is wrong with this file is its shape."""
    with Client(server.url) as client, pytest.raises(InvalidTensor, match="num_virtual_tokens"):
        client.vectors.register("mnli", vector=np.ones((16, MB - 64), np.float32), initialization="family")
    assert is_healthy(server)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which libraries a process has mapped")
def test_the_process_that_answers_has_not_loaded_torch(server: Server) -> None:
    assert is_healthy(server)
    loaded = {Path(mapped.path).name for mapped in server.process.memory_maps()}
    assert any("psycopg" in name for name in loaded)  # names of libraries are what is looked at
    assert not [name for name in loaded if "torch" in name]


def is_healthy(server: Server) -> bool:
    """Ready, and takes a vector that was not there before."""
    with Client(server.url, retries=0) as client:
        tensor = np.random.default_rng().standard_normal((2, 3), dtype=np.float32)
        return client.ready() and client.vectors.register("good", vector=tensor, initialization="family").created
