# Generated from client/tpv/_async/workers.py by scripts/unasync.py; change that file instead.
# ruff: noqa
# fmt: off
"""`client.workers`: who takes jobs from the queue."""

from __future__ import annotations

from collections.abc import Iterator

from tpv._sync.http import Http
from tpv._base import Call
from tpv.schemas.workers import Worker, WorkerReport


class Workers:
    """`client.workers`: who takes jobs from the queue."""

    def __init__(self, http: Http) -> None:
        self._http = http

    def list(self, *, page_size: int | None = None) -> Iterator[Worker]:
        """All workers that were ever there, by name, fetched a page at a time."""
        for worker in self._http.pages(Worker, "/workers", {"limit": page_size}):
            yield worker

    def report(self, report: WorkerReport) -> Worker:
        """Says what a worker can do and that it is there (scope `worker`)."""
        return self._http.ask(Worker, Call(method="POST", path="/workers", message=report, idempotent=True))
