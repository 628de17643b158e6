# Generated from client/tpv/_async/client.py by scripts/unasync.py; change that file instead.
# ruff: noqa
# fmt: off
"""The client: one object with the nouns of the registry as attributes."""

from __future__ import annotations

from types import TracebackType
from typing import Self

import httpx

from tpv import _base
from tpv._sync.combinations import Combinations
from tpv._sync.datasets import Datasets
from tpv._sync.http import Http
from tpv._sync.initializations import Initializations
from tpv._sync.jobs import Jobs
from tpv._sync.similarity import Groupings, Similarity
from tpv._sync.vectors import Vectors
from tpv._sync.workers import Workers


class Client:
    """Speaks to a TPV registry.

    `url` and `token` come from TPV_URL (default http://127.0.0.1:8000) and TPV_TOKEN where they are not given.
    `timeout` is in seconds (60 for an answer, 5 to connect; None waits for ever). `retries` bounds how often a call
    that may be repeated is tried again when the service or the connection fails. `transport` replaces the network, as
    in httpx. Use it in a `with` block, or call `close`.
    """

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        *,
        timeout: float | httpx.Timeout | None = _base.DEFAULT_TIMEOUT,
        retries: int | _base.Retries = _base.Retries(),  # noqa: B008 # frozen
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        settings = _base.Settings.of(url, token, timeout, retries)
        self._http = Http(settings, transport)
        self.jobs = Jobs(self._http)
        self.workers = Workers(self._http)
        self.initializations = Initializations(self._http, self.jobs)
        self.vectors = Vectors(self._http)
        self.combinations = Combinations(self._http)
        self.datasets = Datasets(self._http)
        self.similarity = Similarity(self._http)
        self.groupings = Groupings(self._http)

    @property
    def url(self) -> str:
        """Where the service is."""
        return self._http.settings.url

    def ready(self) -> bool:
        """Whether the service answers and says that it is ready."""
        return self._http.ready()

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self.url!r})"
