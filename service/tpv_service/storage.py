"""Blobs: files addressed by the sha256 of their content, in a directory (here) or in a bucket (`s3.py`).

What is registered is never deleted. What attempts store on their way to a result lies beside it, in a store of its own
(`create_scratch`), because that is: so no blob that a version may point to is ever looked at for deletion. A directory
or bucket belongs to one database: another one's scratch files would be deleted, as nobody's.

Both stores block, all but `presigned_url`; the service calls them in threads. What `put` has returned from is durable.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Protocol, TypeVar

from tpv import files
from tpv.errors import DamagedContent, NotFound, Unavailable
from tpv_service.settings import Settings

T = TypeVar("T")
R = TypeVar("R")

THREADS = 8  #: that move the files of one request


class BlobStore(Protocol):
    """A few verbs. A missing blob is NotFound, a damaged one DamagedContent, a store that is down Unavailable."""

    def __hash__(self) -> int: ...

    def put(self, content: bytes) -> str:
        """Stores the content durably, unless it is there already; gives its digest, `sha256:...`."""

    def put_many(self, contents: Sequence[bytes]) -> list[str]:
        """`put` of each, side by side; gives their digests, in order."""

    def get(self, digest: str) -> bytes:
        """The content, checked against its digest."""

    def delete(self, digest: str, before: datetime) -> None:
        """Removes the blob, unless it has been put since; one that is not there is no error."""

    def digests(self, before: datetime | None = None) -> Iterator[str]:
        """The digest of every blob that is there, or of every one that was last put before then."""

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
    """For what is registered."""
    return _create(settings, "")


def create_scratch(settings: Settings) -> BlobStore:
    """For checkpoints and staged files, in the folder `scratch` of the same directory or bucket."""
    return _create(settings, "scratch/")


def _create(settings: Settings, folder: str) -> BlobStore:
    if settings.blob_directory is not None:
        return DirectoryStore(settings.blob_directory / folder)
    from tpv_service.s3 import S3Store  # here: the minio client is a tenth of the time that the service takes to start

    return S3Store(settings, folder)


def verified(content: bytes, digest: str) -> bytes:
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
        with suppress(FileNotFoundError):
            if files.digest(path.read_bytes()) == digest:  # a damaged one is written anew
                os.utime(path)
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
                return verified(self._path(digest).read_bytes(), digest)
            except FileNotFoundError as error:
                raise NotFound(f"the stored file {digest} is missing", digest=digest) from error

    def delete(self, digest: str, before: datetime) -> None:
        path = self._path(digest)
        with self._errors(), suppress(FileNotFoundError):
            if path.stat().st_mtime < before.timestamp():
                path.unlink()

    def digests(self, before: datetime | None = None) -> Iterator[str]:
        with self._errors():
            for path in sorted(self.root.glob("??/[!.]*")):
                with suppress(FileNotFoundError):  # another process may delete, too
                    if before is None or path.stat().st_mtime < before.timestamp():
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
