# Generated from client/tpv/_async/http.py by scripts/unasync.py; change that file instead.
# ruff: noqa
# fmt: off
"""Sends calls: tries again where that is safe, raises the service's errors, pages through lists, streams content."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
from pydantic import BaseModel

from tpv import _base, _content, errors
from tpv._base import Call, Model
from tpv.schemas.base import Page


class Http:
    """The one place where this client does I/O over the network."""

    def __init__(self, settings: _base.Settings, transport: httpx.BaseTransport | None) -> None:
        self.settings = settings
        self._client = httpx.Client(
            base_url=settings.url,
            headers=settings.headers,
            timeout=settings.timeout,
            transport=transport,
            verify=_base.ssl_context() if transport is None else True,
            follow_redirects=True,  # content may be served by the blob store itself; httpx keeps our token from it
        )

    def close(self) -> None:
        self._client.close()

    def send(self, call: Call, *, stream: bool = False) -> httpx.Response:
        """The successful answer to a call; raises the error that any other answer, or none, means."""
        tried = 0
        while True:
            try:
                request = self._client.build_request(call.method, **call.arguments(self.settings))
                response = self._client.send(request, stream=stream)
                if response.is_success:
                    return response
                response.read()
                response.close()
            except httpx.TransportError as error:
                pause = call.pause(tried, error, self.settings)
                if pause is None:
                    raise self.settings.unreachable(error) from error
            else:
                pause = call.pause(tried, response, self.settings)
                if pause is None:
                    raise _base.error_of(response)
            time.sleep(pause)
            tried += 1

    def ask(self, model: type[Model], call: Call) -> Model:
        """The answer to a call as a message."""
        return _base.decode(model, self.send(call))

    def get(self, model: type[Model], path: str, **params: Any) -> Model:
        return self.ask(model, Call(method="GET", path=path, params=params))

    def post(
        self, model: type[Model], path: str, message: BaseModel, *, idempotent: bool = False, **options: Any
    ) -> Model:
        """Posts a message; with an Idempotency-Key, unless a repetition changes nothing (`idempotent`)."""
        headers = {} if idempotent else _base.new_key()
        call = Call(method="POST", path=path, message=message, headers=headers, idempotent=idempotent, **options)
        return self.ask(model, call)

    def pages(self, model: type[Model], path: str, params: Mapping[str, Any]) -> Iterator[Model]:
        """Every item of a list, a page at a time, as they are asked for."""
        cursor: str | None = None
        while True:
            page = self.get(Page[model], path, **{**params, "cursor": cursor})  # type: ignore[valid-type] # by value
            for item in page.items:
                yield item
            cursor = page.next_cursor
            if cursor is None:
                return

    def download(
        self, path: str, sink: _content.Sink, *, expected: str | None = None, params: Mapping[str, Any] | None = None
    ) -> bytes:
        """Streams content into a sink and verifies it against the expected digest, else against the ETag.

        A transfer that breaks off starts again. Gives the content when the sink is in memory.
        """
        headers = {"Accept": "*/*", "Accept-Encoding": "identity"}
        call = Call(method="GET", path=path, params=params, headers=headers)
        tried = 0
        try:
            while True:
                response = self.send(call, stream=True)
                try:
                    sink.begin()
                    for chunk in response.iter_bytes():
                        sink.write(chunk)
                    # An S3 server that we are redirected to has ETags of its own kind.
                    first = response.history[0] if response.history else response
                    return sink.finish(expected or _content.digest_of(first.headers.get("ETag")), path)
                except httpx.TransportError as error:
                    pause = call.pause(tried, error, self.settings)
                    if pause is None:
                        raise self.settings.unreachable(error) from error
                finally:
                    response.close()
                time.sleep(pause)
                tried += 1
        finally:
            sink.close()

    def ready(self) -> bool:
        """Whether the service answers and says that it is ready."""
        try:
            self.send(Call(method="GET", path="//readyz", retries=_base.Retries(times=0)))
        except (errors.ConnectionFailed, errors.ProblemError):
            return False
        return True
