"""Blobs in a bucket of any S3 endpoint, through the `minio` client."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from io import BytesIO

import structlog
from minio import Minio
from minio.error import InvalidResponseError, MinioException, S3Error
from urllib3 import PoolManager, Retry, Timeout
from urllib3.exceptions import HTTPError

from tpv import files
from tpv.errors import NotFound, Unavailable
from tpv_service.settings import Settings
from tpv_service.storage import side_by_side, verified

log = structlog.get_logger()

_NAME = re.compile(r"[0-9a-f]{2}/[0-9a-f]{62}")


class S3Store:
    """One object a blob, `ab/cdef...` below a folder of a bucket that is made when it is missing."""

    def __init__(self, settings: Settings, folder: str) -> None:
        assert settings.s3_endpoint is not None  # Settings checks it
        assert settings.s3_secret_key is not None
        self.bucket, self.folder = settings.s3_bucket, folder
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
                return verified(response.read(), digest)
            finally:
                response.close()
                response.release_conn()

    def delete(self, digest: str, before: datetime) -> None:
        with suppress(NotFound), self._errors(digest):
            found = self.client.stat_object(self.bucket, self._name(digest))
            if found.last_modified is not None and found.last_modified < before:
                self.client.remove_object(self.bucket, self._name(digest))

    def digests(self, before: datetime | None = None) -> Iterator[str]:
        with self._errors():
            for found in self.client.list_objects(self.bucket, prefix=self.folder, recursive=True):
                name = (found.object_name or "").removeprefix(self.folder)
                old = before is None or (found.last_modified is not None and found.last_modified < before)
                if old and _NAME.fullmatch(name):
                    yield f"sha256:{name.replace('/', '')}"

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

    def _name(self, digest: str) -> str:
        name = digest.removeprefix("sha256:")
        return f"{self.folder}{name[:2]}/{name[2:]}"

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
