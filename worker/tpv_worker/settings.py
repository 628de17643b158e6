"""What the operator of a worker sets, from the environment (`TPV_...`); nobody else in the worker reads it."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

from platformdirs import user_cache_path
from pydantic import BeforeValidator, ByteSize, Field, SecretStr
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict


def _split(separator: str) -> BeforeValidator:
    """Reads one text as a list."""

    def split(value: Any) -> Any:
        return [part for part in value.split(separator) if part] if isinstance(value, str) else value

    return BeforeValidator(split)


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="TPV_", extra="ignore", hide_input_in_errors=True)

    url: str = "http://127.0.0.1:8000"  #: of the service
    token: SecretStr | None = None  #: with the scope `worker`
    queue_url: SecretStr  #: postgresql://..., whose role needs to see the queue's schema only

    # A job may name any model of the hub, but of this machine's directories only those below one of these.
    model_directories: Annotated[list[Path], NoDecode, _split(os.pathsep)] = Field(default_factory=list)
    data_cache: Path = Field(default_factory=lambda: user_cache_path("tpv", appauthor=False) / "splits")

    queues: Annotated[list[str] | None, NoDecode, _split(",")] = None  #: none: every queue
    concurrency: int | None = Field(None, ge=1)  #: attempts at a time; none: one for each device or group of them
    device: str = "cpu"  #: cuda:0, say; cuda: every GPU that is visible
    processes: int = Field(1, ge=1)  #: that train one attempt together, each on a device of its own
    checkpoint_every: timedelta = timedelta(minutes=1)  #: what a lost attempt costs at most, and one step
    memory_limit: ByteSize | None = Field(None, ge=1)  #: of one attempt, on its device; none: all there is
    threads: int | None = Field(None, ge=1)  #: of torch in one attempt; none: its share of the cores
    name: str = Field(default_factory=lambda: f"{socket.gethostname()}:{os.getpid()}", max_length=256)
    grace: timedelta = timedelta(seconds=10)  #: that attempts have to end after SIGTERM; training ends after its step
