"""Blobs: files addressed by the sha256 of their content, in a directory or in a bucket of any S3 endpoint.

Both stores block, all but `presigned_url`; the service calls them in threads. What `put` has returned from is durable.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from typing import Protocol, TypeVar

import structlog
from minio import Minio
from minio.error import InvalidResponseError, MinioException, S3Error
from urllib3 import PoolManager, Retry, Timeout
from urllib3.exceptions import HTTPError

from tpv import files
from tpv.errors import DamagedContent, NotFound, Unavailable
from tpv_service.settings import Settings

T = TypeVar("T")
R = TypeVar("R")

THREADS = 8  #: that move the files of one request

log = structlog.get_logger()


class BlobStore(Protocol):
    """A few verbs. A missing blob is NotFound, a damaged one DamagedContent, a store that is down Unavailable."""

    def __hash__(self) -> int: ...

    def put(self, content: bytes) -> str:
        """Stores the content durably, unless it is there already; gives its digest, `sha256:...`."""

    def put_many(self, contents: Sequence[bytes]) -> list[str]:
        """`put` of each, side by side; gives their digests, in order."""

    def get(self, digest: str) -> bytes:
        """The content, checked against its digest."""

    def delete(self, digest: str) -> None:
        """Removes the blob; one that is not there is no error."""

    def digests(self) -> Iterator[str]:
        """The digest of every blob that is there."""

    def presigned_url(self, digest: str) -> str | None:
        """A URL that a client may download from, if the store can give one. Computed here; asks nobody."""

    def check(self) -> None:
        """Raises Unavailable when nothing can be stored."""


def side_by_side(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """`work` on each item, eight at a time: a store makes its callers wait more than it computes. In their order."""
    if len(items) == 1:
        return [work(items[0])]
    size = -(-len(items) // THREADS) or 1  # a task for each thread: a task for each item takes longer than a small file
    parts = [items[at : at + size] for at in range(0, len(items), size)]
    with ThreadPoolExecutor(THREADS) as pool:
        return [result for part in pool.map(lambda part: [work(item) for item in part], parts) for result in part]


def create_store(settings: Settings) -> BlobStore:
    if settings.blob_directory is not None:
        return DirectoryStore(settings.blob_directory)
    return S3Store(settings)


def _verified(content: bytes, digest: str) -> bytes:
    found = files.digest(content)
    if found != digest:
        raise DamagedContent(
            f"the stored file {digest} has the content {found}; restore it from a backup, then run `tpv admin verify`",
            digest=digest,
        )
    return content


class DirectoryStore:
    """One file a blob, `ab/cdef...`; written under a temporary name, fsynced, then renamed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(mode=0o700, parents=True, exist_ok=True)  # the service's own: vectors may be confidential
        for first in range(256):  # made now, so that a write waits for its own directory alone
            (root / f"{first:02x}").mkdir(exist_ok=True)
        _fsync_directory(root)

    def put(self, content: bytes) -> str:
        with self._errors():
            digest = self._write(content)
            _fsync_directory(self._path(digest).parent)
        return digest

    def put_many(self, contents: Sequence[bytes]) -> list[str]:
        with self._errors():
            digests = side_by_side(self._write, contents)
            side_by_side(_fsync_directory, sorted({self._path(digest).parent for digest in digests}))
        return digests

    def _write(self, content: bytes) -> str:
        """Stores the content, but for its name, which is durable when the directory is."""
        digest = files.digest(content)
        path = self._path(digest)
        if path.exists() and files.digest(path.read_bytes()) == digest:  # a damaged one is written anew
            return digest  # whoever wrote it may not have come to the directory yet
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).rename(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        return digest

    def get(self, digest: str) -> bytes:
        with self._errors():
            try:
                return _verified(self._path(digest).read_bytes(), digest)
            except FileNotFoundError as error:
                raise NotFound(f"the stored file {digest} is missing", digest=digest) from error

    def delete(self, digest: str) -> None:
        with self._errors():
            self._path(digest).unlink(missing_ok=True)

    def digests(self) -> Iterator[str]:
        for path in sorted(self.root.glob("??/[!.]*")):
            yield f"sha256:{path.parent.name}{path.name}"

    def presigned_url(self, digest: str) -> str | None:
        return None

    def check(self) -> None:
        with self._errors(), tempfile.TemporaryFile(dir=self.root):
            pass

    def _path(self, digest: str) -> Path:
        name = digest.removeprefix("sha256:")
        return self.root / name[:2] / name[2:]

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise Unavailable(f"the blob directory does not take or give files: {error.strerror}") from error


def _fsync_directory(path: Path) -> None:
    """Makes names in a directory durable; without it a rename may be lost in a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class S3Store:
    """One object a blob, `ab/cdef...`, in a bucket that is made when it is missing."""

    def __init__(self, settings: Settings) -> None:
        assert settings.s3_endpoint is not None  # Settings checks it
        assert settings.s3_secret_key is not None
        self.bucket = settings.s3_bucket
        self.presign: timedelta | None = settings.s3_presign_lifetime if settings.s3_presign else None
        self.client = Minio(
            settings.s3_endpoint,
            access_key=settings.s3_access_key,
            secret_key=settings.s3_secret_key.get_secret_value(),
            region=settings.s3_region,
            secure=settings.s3_secure,
            http_client=PoolManager(
                maxsize=settings.database_connections,
                timeout=Timeout(connect=2, read=30),  # seconds
                retries=Retry(total=2, backoff_factor=0.1, status_forcelist=[500, 502, 503, 504]),
            ),
        )
        try:
            self.check()
        except Unavailable as error:
            log.warning("the object store does not answer yet", detail=error.detail)

    def put(self, content: bytes) -> str:
        digest = files.digest(content)
        with self._errors(digest):
            try:
                self._put(digest, content)
            except (S3Error, InvalidResponseError) as error:
                if _code(error) != "NoSuchBucket":
                    raise
                self._make_bucket()
                self._put(digest, content)
        return digest

    def put_many(self, contents: Sequence[bytes]) -> list[str]:
        return side_by_side(self.put, contents)

    def _put(self, digest: str, content: bytes) -> None:
        # The same name always holds the same bytes, so writing it again changes nothing.
        self.client.put_object(self.bucket, self._name(digest), BytesIO(content), len(content))

    def get(self, digest: str) -> bytes:
        with self._errors(digest):
            response = self.client.get_object(self.bucket, self._name(digest))
            try:
                return _verified(response.read(), digest)
            finally:
                response.close()
                response.release_conn()

    def delete(self, digest: str) -> None:
        with self._errors(digest):
            self.client.remove_object(self.bucket, self._name(digest))

    def digests(self) -> Iterator[str]:
        with self._errors():
            for found in self.client.list_objects(self.bucket, recursive=True):
                yield f"sha256:{found.object_name.replace('/', '')}"

    def presigned_url(self, digest: str) -> str | None:
        if self.presign is None:
            return None
        with self._errors(digest):
            return self.client.presigned_get_object(self.bucket, self._name(digest), expires=self.presign)

    def check(self) -> None:
        with self._errors():
            if not self.client.bucket_exists(self.bucket):
                self._make_bucket()

    def _make_bucket(self) -> None:
        try:
            self.client.make_bucket(self.bucket)
        except S3Error as error:  # another process was faster
            if error.code not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                raise

    @staticmethod
    def _name(digest: str) -> str:
        name = digest.removeprefix("sha256:")
        return f"{name[:2]}/{name[2:]}"

    @contextmanager
    def _errors(self, digest: str | None = None) -> Iterator[None]:
        try:
            yield
        except (S3Error, InvalidResponseError) as error:
            if _code(error) == "NoSuchKey":
                raise NotFound(f"the stored file {digest} is missing", digest=digest) from error
            raise Unavailable(f"the object store refused: {_code(error)}") from error
        except (HTTPError, MinioException, OSError) as error:
            raise Unavailable(f"the object store does not answer ({type(error).__name__}); try again later") from error


def _code(error: S3Error | InvalidResponseError) -> str:
    """The S3 error code. The minio client does not read it from servers that label their XML `text/xml`."""
    if isinstance(error, S3Error):
        return error.code or "unknown"
    found = re.search(r"<Code>(\w+)</Code>", str(error))
    return found[1] if found else "unknown"
