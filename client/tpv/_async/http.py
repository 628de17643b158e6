"""Sends calls: tries again where that is safe, raises the service's errors, pages through lists, streams content."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx
from pydantic import BaseModel

from tpv import _base, _content, errors
from tpv._base import Call, Model
from tpv.schemas.base import Page


class AsyncHttp:
    """The one place where this client does I/O over the network."""

    def __init__(self, settings: _base.Settings, transport: httpx.AsyncBaseTransport | None) -> None:
        self.settings = settings
        self._client = httpx.AsyncClient(
            base_url=settings.url,
            headers=settings.headers,
            timeout=settings.timeout,
            transport=transport,
            verify=_base.ssl_context() if transport is None else True,
            follow_redirects=True,  # content may be served by the blob store itself; httpx keeps our token from it
        )

    async def aclose(self) -> None:
        await self._client.aclose()

    async def send(self, call: Call, *, stream: bool = False) -> httpx.Response:
        """The successful answer to a call; raises the error that any other answer, or none, means."""
        tried = 0
        while True:
            try:
                request = self._client.build_request(call.method, **call.arguments(self.settings))
                response = await self._client.send(request, stream=stream)
                if response.is_success:
                    return response
                await response.aread()
                await response.aclose()
            except httpx.TransportError as error:
                pause = call.pause(tried, error, self.settings)
                if pause is None:
                    raise self.settings.unreachable(error) from error
            else:
                pause = call.pause(tried, response, self.settings)
                if pause is None:
                    raise _base.error_of(response)
            await asyncio.sleep(pause)
            tried += 1

    async def ask(self, model: type[Model], call: Call) -> Model:
        """The answer to a call as a message."""
        return _base.decode(model, await self.send(call))

    async def get(self, model: type[Model], path: str, **params: Any) -> Model:
        return await self.ask(model, Call(method="GET", path=path, params=params))

    async def post(
        self, model: type[Model], path: str, message: BaseModel, *, idempotent: bool = False, **options: Any
    ) -> Model:
        """Posts a message; with an Idempotency-Key, unless a repetition changes nothing (`idempotent`)."""
        headers = {} if idempotent else _base.new_key()
        call = Call(method="POST", path=path, message=message, headers=headers, idempotent=idempotent, **options)
        return await self.ask(model, call)

    async def pages(self, model: type[Model], path: str, params: Mapping[str, Any]) -> AsyncIterator[Model]:
        """Every item of a list, a page at a time, as they are asked for."""
        cursor: str | None = None
        while True:
            page = await self.get(Page[model], path, **{**params, "cursor": cursor})  # type: ignore[valid-type] # by value
            for item in page.items:
                yield item
            cursor = page.next_cursor
            if cursor is None:
                return

    async def download(
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
                response = await self.send(call, stream=True)
                try:
                    sink.begin()
                    async for chunk in response.aiter_bytes():
                        sink.write(chunk)
                    # An S3 server that we are redirected to has ETags of its own kind.
                    first = response.history[0] if response.history else response
                    return sink.finish(expected or _content.digest_of(first.headers.get("ETag")), path)
                except httpx.TransportError as error:
                    pause = call.pause(tried, error, self.settings)
                    if pause is None:
                        raise self.settings.unreachable(error) from error
                finally:
                    await response.aclose()
                await asyncio.sleep(pause)
                tried += 1
        finally:
            sink.close()

    async def ready(self) -> bool:
        """Whether the service answers and says that it is ready."""
        try:
            await self.send(Call(method="GET", path="//readyz", retries=_base.Retries(times=0)))
        except (errors.ConnectionFailed, errors.ProblemError):
            return False
        return True
