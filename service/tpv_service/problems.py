"""Every error leaves the service as RFC 9457 problem+json, from here."""

from __future__ import annotations

import re

import psycopg
import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from psycopg import DataError, OperationalError
from psycopg.errors import ProgramLimitExceeded
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tpv.errors import Forbidden, Invalid, NotFound, ProblemError, TooLarge, Unauthorized, Unavailable
from tpv.references import NAME_HELP

log = structlog.get_logger()

MEDIA_TYPE = "application/problem+json"


def answer(error: ProblemError, status: int | None = None) -> JSONResponse:
    headers = {"WWW-Authenticate": "Bearer"} if isinstance(error, Unauthorized) else {}
    if isinstance(error, Unavailable):
        headers["Retry-After"] = "1"
    document = error.problem()
    document["status"] = status or error.status
    return JSONResponse(document, document["status"], headers, MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Registers the handlers; what none of them knows is logged and answered without its text."""

    @app.exception_handler(ProblemError)
    async def known(request: Request, error: ProblemError) -> JSONResponse:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return answer(invalid_request(error))

    @app.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> JSONResponse:
        if isinstance(error.__cause__, ProblemError):
            return answer(error.__cause__)
        if b"%2f" in request.scope.get("raw_path", b"").lower():
            return answer(Invalid(f"a name in {request.url.path} has a slash; a name is {NAME_HELP}"))
        if error.status_code == 404:
            return answer(NotFound(f"there is nothing at {request.url.path}; see /docs"))
        return answer(Invalid(str(error.detail)), error.status_code)

    @app.exception_handler(DBAPIError)
    @app.exception_handler(psycopg.Error)  # of COPY, which is no business of SQLAlchemy
    @app.exception_handler(PoolTimeout)
    async def database(request: Request, error: Exception) -> JSONResponse:
        cause = getattr(error, "orig", error)
        if isinstance(cause, ProgramLimitExceeded | DataError):  # such as a zero byte, which no text may have
            return answer(Invalid(f"a value cannot be stored: {str(cause).splitlines()[0]}"))
        if isinstance(cause, OperationalError | PoolTimeout):
            return answer(Unavailable("the database does not answer; try again later"))
        return unknown(request, error)

    @app.exception_handler(Exception)
    async def any_other(request: Request, error: Exception) -> JSONResponse:
        return unknown(request, error)


def unknown(request: Request, error: Exception) -> JSONResponse:
    log.error("unexpected error", path=request.url.path, method=request.method, exc_info=error)
    return answer(ProblemError("an unexpected error; the service's log has the details"))


def invalid_request(error: RequestValidationError) -> Invalid:
    """One sentence naming the first wrong member, and all of them as `errors`."""
    errors = [{"where": ".".join(str(part) for part in e["loc"]), "what": e["msg"]} for e in error.errors()]
    return Invalid("; ".join(f"{e['where']}: {e['what']}" for e in errors[:3]), errors=errors)


class BodyLimit:
    """Refuses a body over the limit: at once by its declared length, else as soon as the bytes received pass it.

    Whatever is answered before the body has come to its end closes the connection; the server would go on reading,
    and throwing away, the rest of it otherwise.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        too_large = TooLarge(f"a request's body may have {self.limit} bytes (TPV_UPLOAD_LIMIT)", limit=self.limit)
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "0")
        received, open_ended = 0, declared != "0" or "transfer-encoding" in headers

        async def counted() -> Message:
            nonlocal received, open_ended
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.limit:
                raise HTTPException(413) from too_large
            open_ended = open_ended and message.get("more_body", False)
            return message

        async def closing(message: Message) -> None:
            if message["type"] == "http.response.start" and open_ended:
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            await send(message)

        if not re.fullmatch("[0-9]{1,18}", declared) or int(declared) > self.limit:
            await answer(too_large)(scope, receive, closing)
            return
        await self.app(scope, counted, closing)


class LoopbackOnly:
    """Without tokens, whoever reaches the service may do all; so it answers only what this machine's user asks.

    A page of another site could reach it through the user's browser: by a name of its own that resolves to loopback,
    which the Host header tells, or by a plain form, which the browser marks as cross-site.
    """

    HOST = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?", re.IGNORECASE)

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            if not self.HOST.fullmatch(headers.get("host", "")) or headers.get("sec-fetch-site") == "cross-site":
                refused = Forbidden("without tokens only this machine is answered, and no page of another site")
                await answer(refused)(scope, receive, send)
                return
        await self.app(scope, receive, send)
