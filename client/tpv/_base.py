"""What both clients share and what does no I/O over the network: settings, calls, retries, answers, digests."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import ssl
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib import metadata
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel, TypeAdapter, ValidationError

from tpv import errors
from tpv._content import Upload
from tpv.schemas.initializations import BaseModelReference

API = "/api/v1"
DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT = httpx.Timeout(60.0, connect=5.0)  #: seconds without a byte; to connect

Model = TypeVar("Model", bound=BaseModel)


class Unset:
    """The type of `UNSET`: an argument that was not given, where None means something."""

    def __repr__(self) -> str:
        return "UNSET"


UNSET = Unset()


# --- Settings --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Retries:
    """How often an idempotent call is tried again, and after how many seconds.

    The pauses double from `first` to at most `longest`, each shortened at random by up to a half, so that clients that
    failed together do not come back together: 0.25, 0.5, 1.0 ... A `Retry-After` of the service is the least to wait;
    when it asks for more than `patience`, the call is given up.
    """

    times: int = 3
    first: float = 0.25  #: seconds
    longest: float = 5.0  #: seconds
    patience: float = 60.0  #: seconds; a service that asks for more is reported as unavailable

    def pause(self, tried: int, retry_after: str | None = None) -> float | None:
        """Seconds to wait after the try number `tried` (from 0 on); None: give up."""
        if tried >= self.times:
            return None
        asked = _seconds(retry_after)
        if asked is not None and asked > self.patience:
            return None
        own = min(self.longest, self.first * 2.0**tried) * random.uniform(0.5, 1.0)  # noqa: S311 # no secret
        return max(asked or 0.0, own)


LONG_WAIT = Retries(times=9)  #: about half a minute: following a job outlives a restart of the service


def _seconds(retry_after: str | None) -> float | None:
    """Seconds that a `Retry-After` header asks for, written as a number or as a date."""
    if not retry_after:
        return None
    with contextlib.suppress(ValueError):
        return max(0.0, float(retry_after))
    with contextlib.suppress(ValueError):
        return max(0.0, (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds())
    return None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Where the service is and how it is spoken to; arguments win over TPV_URL and TPV_TOKEN."""

    url: str
    token: str | None = field(repr=False)
    timeout: httpx.Timeout
    retries: Retries

    @classmethod
    def of(
        cls, url: str | None, token: str | None, timeout: float | httpx.Timeout | None, retries: int | Retries
    ) -> Settings:
        url = (url or os.environ.get("TPV_URL") or DEFAULT_URL).rstrip("/")
        if not url.startswith(("http://", "https://")):
            raise errors.ConnectionFailed(f"{url!r} is no address of a service: it begins with http:// or https://")
        return cls(
            url=url,
            token=token or os.environ.get("TPV_TOKEN") or None,
            timeout=timeout if isinstance(timeout, httpx.Timeout) else httpx.Timeout(timeout),
            retries=retries if isinstance(retries, Retries) else Retries(times=retries),
        )

    @property
    def headers(self) -> dict[str, str]:
        headers = {"User-Agent": f"tpv/{version()}", "Accept": "application/json"}
        return {**headers, "Authorization": f"Bearer {self.token}"} if self.token else headers

    def unreachable(self, error: httpx.TransportError) -> errors.ConnectionFailed:
        """What to tell when no answer came."""
        if isinstance(error, httpx.ReadTimeout | httpx.WriteTimeout):
            return errors.ConnectionFailed(f"{self.url} did not answer in time; ask again, or with a longer timeout")
        reason = str(error) or type(error).__name__
        return errors.ConnectionFailed(f"could not reach {self.url} ({reason}); start a service with: tpv up")


@functools.cache
def ssl_context() -> ssl.SSLContext:
    """The certificates to trust, read once for all clients of a process: it takes tens of milliseconds."""
    return httpx.create_ssl_context()


def version() -> str:
    """The installed version; `0+unknown` when running from files that are not installed."""
    try:
        return metadata.version("tpv-registry")
    except metadata.PackageNotFoundError:
        return "0+unknown"


# --- Calls -----------------------------------------------------------------------------------------------------------

_IDEMPOTENT = frozenset({"GET", "HEAD", "PUT", "DELETE"})
_RETRIED = frozenset({502, 503, 504})
# Nothing of these says whether the service has acted; a slow answer (ReadTimeout) is not asked for again, as it is
# likely to be slow again.
_BROKEN = (httpx.NetworkError, httpx.ConnectTimeout, httpx.RemoteProtocolError)


@dataclass(frozen=True, kw_only=True)
class Call:
    """One request, in a form that can be sent again."""

    method: str
    path: str  #: below API, or from the root when it begins with a double slash
    params: Mapping[str, Any] | None = None
    message: BaseModel | None = None  #: becomes the JSON body
    content: bytes | None = None
    form: Mapping[str, str] | None = None
    parts: Mapping[str, tuple[str, Upload, str]] | None = None  #: multipart files: name, file, type
    headers: Mapping[str, str] = field(default_factory=dict)
    idempotent: bool = False  #: a POST that only asks, or whose repetition changes nothing
    read_timeout: float | None = None  #: seconds, instead of the client's own
    retries: Retries | None = None

    def repeatable(self) -> bool:
        return self.idempotent or self.method in _IDEMPOTENT or "Idempotency-Key" in self.headers

    def arguments(self, settings: Settings) -> dict[str, Any]:
        """The arguments of httpx's `build_request`."""
        given: dict[str, Any] = {
            "url": self.path[1:] if self.path.startswith("//") else API + self.path,
            "params": {name: value for name, value in (self.params or {}).items() if value is not None},
            "headers": dict(self.headers),
        }
        if self.message is not None:
            given["content"] = self.message.model_dump_json(exclude_unset=True)
            given["headers"]["Content-Type"] = "application/json"
        elif self.content is not None:
            given["content"] = self.content
            given["headers"]["Content-Type"] = "application/octet-stream"
        elif self.parts is not None:
            given["data"], given["files"] = dict(self.form or {}), dict(self.parts)
        if self.read_timeout is not None:
            given["timeout"] = httpx.Timeout(**{**settings.timeout.as_dict(), "read": self.read_timeout})
        return given

    def pause(self, tried: int, outcome: httpx.Response | httpx.TransportError, settings: Settings) -> float | None:
        """Seconds after which the call is made again, None when its outcome stands."""
        retries = self.retries or settings.retries
        if not self.repeatable():
            return None
        if isinstance(outcome, httpx.Response):
            return retries.pause(tried, outcome.headers.get("Retry-After")) if outcome.status_code in _RETRIED else None
        return retries.pause(tried) if isinstance(outcome, _BROKEN) else None


def new_key() -> dict[str, str]:
    """The header by which the service knows a repeated request: made once a call, kept over its retries."""
    return {"Idempotency-Key": str(uuid.uuid4())}


# --- Answers ---------------------------------------------------------------------------------------------------------


def error_of(response: httpx.Response) -> errors.ProblemError:
    """The error that an unsuccessful answer means; the answer has been read."""
    try:
        document = response.json()
    except ValueError:
        document = None
    if not isinstance(document, dict):  # a proxy's page, or another service
        text = " ".join(response.text.split())[:200]
        document = {"detail": f"HTTP status {response.status_code} from {response.url}" + (f": {text}" if text else "")}
    return errors.from_problem(document, response.status_code)


def decode(model: type[Model], response: httpx.Response) -> Model:
    """The answer as a message; raises ConnectionFailed when this is no registry's answer."""
    try:
        return model.model_validate_json(response.content)
    except ValidationError as error:
        raise _foreign(response, error) from error


def decode_list(model: type[Model], response: httpx.Response) -> list[Model]:
    try:
        return TypeAdapter(list[model]).validate_json(response.content)  # type: ignore[valid-type] # by value
    except ValidationError as error:
        raise _foreign(response, error) from error


def _foreign(response: httpx.Response, error: Exception) -> errors.ConnectionFailed:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return errors.ConnectionFailed(f"{response.url} answered, but not as this client understands it: {reason}")


def message(model: type[Model], /, **members: Any) -> Model:
    """A request message; raises errors.Invalid naming the members that are wrong."""
    try:
        return model.model_validate(members)
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_context=False, include_input=False)
        detail = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'request'}: {e['msg']}" for e in wrong)
        raise errors.Invalid(detail, errors=wrong) from error


def given(**members: Any) -> dict[str, Any]:
    """The members that are not None: a message leaves the rest to the service's defaults."""
    return {name: value for name, value in members.items() if value is not None}


def base_model(model: str | BaseModelReference, revision: str | None, unpinned: bool) -> BaseModelReference:
    """A base model as the wire has it."""
    if isinstance(model, BaseModelReference):
        return model
    return message(BaseModelReference, **given(id=model, revision=revision, unpinned=unpinned or None))
