"""Everything that an operator sets, from the environment (`TPV_...`); nobody else reads the environment."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, ByteSize, Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


def _psycopg(url: SecretStr) -> SecretStr:
    """The same URL for SQLAlchemy's psycopg 3 driver, whichever Postgres scheme was written."""
    scheme, separator, rest = url.get_secret_value().partition("://")
    if not separator or scheme.split("+")[0] not in ("postgresql", "postgres"):
        raise ValueError("use postgresql://user:password@host:port/database")
    return SecretStr(f"postgresql+psycopg://{rest}")


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="TPV_", extra="ignore", hide_input_in_errors=True)

    database_url: Annotated[SecretStr, AfterValidator(_psycopg)]
    database_connections: int = Field(20, ge=4, description="Connections that one API process may hold.")

    # Blobs: a directory, or a bucket of any S3 endpoint.
    blob_directory: Path | None = None
    s3_endpoint: str | None = None  #: host:port
    s3_bucket: str = "tpv"
    s3_access_key: str | None = None
    s3_secret_key: SecretStr | None = None
    s3_region: str = "us-east-1"  #: most stores other than Amazon's take this one
    s3_secure: bool = True  #: https
    s3_presign: bool = False  #: downloads answer 307 with a URL of the store itself
    s3_presign_lifetime: timedelta = timedelta(minutes=10)

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    authentication: bool = True  #: False: no tokens, on loopback only
    initial_token: SecretStr | None = Field(None, min_length=16)
    upload_limit: ByteSize = ByteSize(64 * 1024**2)  #: of one request's body

    cache_directory: Path | None = None  #: copies of vectors for searching; none: a temporary one, made anew every time
    search_index_above: int = Field(
        40_000_000, ge=1, description="Vectors times width from which an index may be made."
    )
    search_index_memory: ByteSize = ByteSize(512 * 1024**2)  #: that building an index may take in the database

    stalled_after: timedelta = timedelta(seconds=30)  #: a worker is lost when its heartbeat is older
    stalled_check: timedelta = timedelta(seconds=10)
    silent_after: timedelta = timedelta(hours=2)  #: an attempt hangs that has reported nothing for so long
    jobs_per_owner: int | None = Field(None, ge=1, description="Jobs of one owner that may run at a time.")
    retry_limit: int = Field(10, ge=1, description="Attempts in a row that a job may lose before it fails.")
    retry_pause: timedelta = timedelta(seconds=2)  #: after the first lost attempt, twice as long after each further one

    @model_validator(mode="after")
    def _one_store(self) -> Self:
        if (self.blob_directory is None) == (self.s3_endpoint is None):
            raise ValueError("set exactly one of TPV_BLOB_DIRECTORY and TPV_S3_ENDPOINT")
        if self.s3_endpoint and not (self.s3_access_key and self.s3_secret_key):
            raise ValueError("TPV_S3_ENDPOINT needs TPV_S3_ACCESS_KEY and TPV_S3_SECRET_KEY")
        return self
