"""`client.workers`: who takes jobs from the queue."""

from __future__ import annotations

from collections.abc import AsyncIterator

from tpv._async.http import AsyncHttp
from tpv._base import Call
from tpv.schemas.workers import Worker, WorkerReport


class AsyncWorkers:
    """`client.workers`: who takes jobs from the queue."""

    def __init__(self, http: AsyncHttp) -> None:
        self._http = http

    async def list(self, *, page_size: int | None = None) -> AsyncIterator[Worker]:
        """All workers that were ever there, by name, fetched a page at a time."""
        async for worker in self._http.pages(Worker, "/workers", {"limit": page_size}):
            yield worker

    async def report(self, report: WorkerReport) -> Worker:
        """Says what a worker can do and that it is there (scope `worker`)."""
        return await self._http.ask(Worker, Call(method="POST", path="/workers", message=report, idempotent=True))
