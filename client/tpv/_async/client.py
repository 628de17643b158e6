"""The client: one object with the nouns of the registry as attributes."""

from __future__ import annotations

from types import TracebackType
from typing import Self

import httpx

from tpv import _base
from tpv._async.combinations import AsyncCombinations
from tpv._async.datasets import AsyncDatasets
from tpv._async.http import AsyncHttp
from tpv._async.initializations import AsyncInitializations
from tpv._async.jobs import AsyncJobs
from tpv._async.similarity import AsyncGroupings, AsyncSimilarity
from tpv._async.vectors import AsyncVectors
from tpv._async.workers import AsyncWorkers


class AsyncClient:
    """Speaks to a TPV registry.

    `url` and `token` come from TPV_URL (default http://127.0.0.1:8000) and TPV_TOKEN where they are not given.
    `timeout` is in seconds (60 for an answer, 5 to connect; None waits for ever). `retries` bounds how often a call
    that may be repeated is tried again when the service or the connection fails. `transport` replaces the network, as
    in httpx. Use it in a `with` block, or call `aclose`.
    """

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        *,
        timeout: float | httpx.Timeout | None = _base.DEFAULT_TIMEOUT,
        retries: int | _base.Retries = _base.Retries(),  # noqa: B008 # frozen
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        settings = _base.Settings.of(url, token, timeout, retries)
        self._http = AsyncHttp(settings, transport)
        self.jobs = AsyncJobs(self._http)
        self.workers = AsyncWorkers(self._http)
        self.initializations = AsyncInitializations(self._http, self.jobs)
        self.vectors = AsyncVectors(self._http)
        self.combinations = AsyncCombinations(self._http)
        self.datasets = AsyncDatasets(self._http)
        self.similarity = AsyncSimilarity(self._http)
        self.groupings = AsyncGroupings(self._http)

    @property
    def url(self) -> str:
        """Where the service is."""
        return self._http.settings.url

    async def ready(self) -> bool:
        """Whether the service answers and says that it is ready."""
        return await self._http.ready()

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"AsyncClient({self.url!r})"
