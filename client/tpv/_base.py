"""What both clients share and what does no I/O over the network: settings, calls, retries, answers, digests."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib import metadata
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

import httpx
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, TypeAdapter, ValidationError

from tpv import errors, files
from tpv.references import DEFAULT_NAMESPACE, Reference
from tpv.schemas.datasets import Dataset
from tpv.schemas.initializations import BaseModelReference, Initialization
from tpv.schemas.jobs import Event, Job
from tpv.schemas.vectors import InitializationSummary, Version

API = "/api/v1"
DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT = httpx.Timeout(60.0, connect=5.0)  #: seconds without a byte; to connect

Model = TypeVar("Model", bound=BaseModel)
Advance = Callable[[int], object]  #: told how many further bytes have moved


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
    failed together do not come back together: 0.25, 0.5, 1.0 ... A `Retry-After` of the service is kept to instead,
    unless it asks for more than `patience`.
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
        if asked is not None:
            return asked if asked <= self.patience else None
        return min(self.longest, self.first * 2.0**tried) * random.uniform(0.5, 1.0)  # noqa: S311 # no secret


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
            return errors.ConnectionFailed(f"{self.url} did not answer in time ({self.timeout.read:g} s)")
        reason = str(error) or type(error).__name__
        return errors.ConnectionFailed(f"could not reach {self.url} ({reason}); start a service with: tpv up")


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


# --- References ------------------------------------------------------------------------------------------------------

VectorLike = str | Version
InitializationLike = str | Initialization | InitializationSummary
DatasetLike = str | Dataset


def reference_of(thing: VectorLike | InitializationLike | DatasetLike) -> str:
    """A reference as text, of a reference or of what the service answered."""
    if isinstance(thing, str):
        return thing
    if isinstance(thing, Version | Dataset):
        return thing.reference
    return f"{thing.namespace}/{thing.name}" if thing.name else str(thing.id)


def initialization_path(thing: InitializationLike) -> str:
    """`/initializations/{ns}/{ref}` of a name, id or fingerprint."""
    if not isinstance(thing, str):
        return f"/initializations/{thing.namespace}/{thing.id}"
    reference = Reference.parse(thing)
    if reference.selector:
        raise errors.InvalidReference(f"{thing!r}: an initialization has no versions or aliases")
    return f"/initializations/{reference.namespace}/{reference.name or reference.id or reference.fingerprint}"


def named(text: str, what: str) -> Reference:
    """A reference by name; raises InvalidReference for an id or a fingerprint."""
    reference = Reference.parse(text)
    if reference.name is None:
        raise errors.InvalidReference(f"{text!r}: a {what} is named as [namespace/]name")
    return reference


def bare(text: str, what: str) -> Reference:
    """A name alone; raises InvalidReference when a version or an alias is in it."""
    reference = named(text, what)
    if reference.selector:
        raise errors.InvalidReference(f"{text!r}: name the {what} alone, without {text[len(reference.name or '') :]!r}")
    return reference


def vector_path(thing: VectorLike) -> str:
    """`/vectors/{ns}/{name}/versions/{v}`; without a version or alias, the newest."""
    reference = named(reference_of(thing), "vector")
    return f"/vectors/{reference.path}/versions/{reference.selector or 'newest'}"


def dataset_path(thing: DatasetLike) -> str:
    """`/datasets/{ns}/{name}/versions/{v}`; without a version, the newest."""
    reference = named(reference_of(thing), "data set")
    if reference.alias:
        raise errors.InvalidReference(f"{thing!r}: data sets have no aliases, write name or name:version")
    return f"/datasets/{reference.path}/versions/{reference.selector or 'newest'}"


def job_id(job: Any) -> str:
    """The id of a job, given as itself, as text or as a Job."""
    try:
        return str(uuid.UUID(str(getattr(job, "id", job))))
    except ValueError as error:
        raise errors.InvalidReference(f"{str(job)!r} is no job: jobs are named by their id") from error


def split_output(name: str | None, what: str) -> tuple[str, str | None]:
    """Namespace and name of something that is to be created."""
    if name is None:
        return DEFAULT_NAMESPACE, None
    reference = bare(name, what)
    return reference.namespace, reference.name


# --- Content ---------------------------------------------------------------------------------------------------------


def as_array(values: Any) -> NDArray[Any]:
    """A NumPy array of an array of any library; a torch tensor may need gradients, be bfloat16 or lie on a device."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        if str(values.dtype) == "torch.bfloat16":
            values = values.float()
    return np.asarray(values)


def jsonl(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Rows as JSON Lines."""
    return b"".join(json.dumps(dict(row), ensure_ascii=False).encode() + b"\n" for row in rows)


def rows_of(content: bytes) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file."""
    return [json.loads(line) for line in content.splitlines() if line.strip()]


def open_upload(source: str | Path | bytes) -> IO[bytes]:
    """A file to upload: of a path, or of bytes."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    return Path(source).open("rb")  # closed by the caller


class Upload(io.RawIOBase):
    """A file that tells how much of it has been read; httpx reads it again from the start for a repeated call."""

    def __init__(self, file: IO[bytes], advance: Advance) -> None:
        self._file, self._advance, self._told = file, advance, 0

    def fileno(self) -> int:
        return self._file.fileno()

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        content = self._file.read(size)
        self._tell(self._told + len(content))
        return content

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position = self._file.seek(offset, whence)
        if whence == io.SEEK_SET:  # httpx seeks to the end only to learn the size
            self._tell(position)
        return position

    def tell(self) -> int:
        return self._file.tell()

    def _tell(self, position: int) -> None:
        self._advance(position - self._told)
        self._told = position


class Sink:
    """Where a download goes: memory, or a file that appears under its name only when it is complete and verified."""

    def __init__(self, path: str | Path | None = None, advance: Advance | None = None) -> None:
        self.path = Path(path) if path is not None else None
        self.advance = advance or (lambda count: None)
        self.written = 0
        self._hash = hashlib.sha256()
        self._memory = io.BytesIO()
        self._file: IO[bytes] = self._memory
        if self.path is not None:
            handle, self._temporary = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
            self._file = os.fdopen(handle, "w+b")

    def begin(self) -> None:
        """Starts over: what an interrupted try has written is dropped."""
        self.advance(-self.written)
        self.written, self._hash = 0, hashlib.sha256()
        self._file.seek(0)
        self._file.truncate()

    def write(self, chunk: bytes) -> None:
        self._file.write(chunk)
        self._hash.update(chunk)
        self.written += len(chunk)
        self.advance(len(chunk))

    def finish(self, expected: str | None, source: str) -> bytes:
        """Verifies the digest, then shows the file; gives the content that went to memory. Raises DamagedContent."""
        found = f"sha256:{self._hash.hexdigest()}"
        if expected is not None and found != expected:
            raise errors.DamagedContent(f"what came from {source} has the digest {found}, not {expected}; dropped")
        if self.path is None:
            return self._memory.getvalue()
        self._file.close()
        umask = os.umask(0)
        os.umask(umask)
        Path(self._temporary).chmod(0o666 & ~umask)  # mkstemp's own mode is the owner's only
        Path(self._temporary).replace(self.path)
        return b""

    def close(self) -> None:
        """Removes what was not finished."""
        self._file.close()
        if self.path is not None:
            Path(self._temporary).unlink(missing_ok=True)


def digest_of(etag: str | None) -> str | None:
    """The `sha256:...` that an ETag names; None for an ETag of another kind (an S3 server's own)."""
    value = (etag or "").removeprefix("W/").strip('"')
    return value if value.startswith("sha256:") else None


SAFETENSORS = "application/octet-stream"


def size_of(file: IO[bytes]) -> int:
    """Bytes of an opened file."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    return size


def tensor_of(content: bytes, name: str, fingerprint: str) -> NDArray[np.float32]:
    """The one tensor of a downloaded file, verified against its fingerprint."""
    tensors = files.load(content)
    if name not in tensors:
        raise errors.InvalidTensor(f"the file has no tensor {name!r}; it has: {', '.join(tensors) or 'none'}")
    found = files.fingerprint(tensors[name])
    if found != fingerprint:
        raise errors.DamagedContent(f"the tensor that came has the fingerprint {found}, not {fingerprint}")
    return tensors[name]


def base_model(model: str | BaseModelReference, revision: str | None, unpinned: bool) -> BaseModelReference:
    """A base model as the wire has it."""
    if isinstance(model, BaseModelReference):
        return model
    return message(BaseModelReference, **given(id=model, revision=revision, unpinned=unpinned or None))


@contextlib.contextmanager
def transfer(description: str, total: int, shown: bool) -> Iterator[Advance]:
    """A progress bar over bytes, where one is wanted."""
    if not shown:
        yield lambda count: None
        return
    from tpv import progress  # rich is loaded only when something is shown

    with progress.transfer(description, total) as advance:
        yield advance


class Following(Protocol):
    """What is told of the events of jobs that are waited for."""

    def event(self, job: Job, event: Event) -> None: ...
    def ended(self, job: Job) -> None: ...


@contextlib.contextmanager
def following(jobs: Sequence[Job]) -> Iterator[Following]:
    """Progress bars of jobs."""
    from tpv import progress

    with progress.following(jobs) as bars:
        yield bars
