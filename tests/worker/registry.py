"""The service as attempts and workers see it, on a loopback port: for processes that the test starts."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, dict[str, Any]]


def problem(kind: str, status: int) -> Answer:
    return status, {"type": f"urn:tpv:problem:{kind}", "status": status, "detail": f"the service says {kind}"}


class Registry:
    """Answers with what `answers` gives for the last part of a path; remembers what it was sent there."""

    def __init__(self, url: str, answers: Callable[[str, Any], Answer]) -> None:
        self.url, self.answers = url, answers
        self.sent: list[tuple[str, Any]] = []

    def bodies(self, what: str) -> list[Any]:
        return [body for path, body in self.sent if path == what]

    def events(self, type: str) -> list[str]:  # noqa: A002 # the wire's name
        """What the events of a type say that it has taken or refused, in their order."""
        events = [event for body in self.bodies("events") for event in body["events"]]
        return [event["data"]["message"] for event in events if event["type"] == type]


@contextmanager
def registry(answers: Callable[[str, Any], Answer]) -> Iterator[Registry]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            what = self.path.rpartition("/")[2]
            found.sent.append((what, body))
            status, answer = answers(what, body)
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            with suppress(ConnectionError):  # who has asked may have been killed
                self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found = Registry(f"http://127.0.0.1:{server.server_port}", answers)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield found
        finally:
            server.shutdown()
            thread.join()
