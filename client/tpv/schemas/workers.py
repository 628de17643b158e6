"""Workers on the wire: what they say of themselves, and what others see of them."""

from __future__ import annotations

from datetime import datetime
from typing import Literal
from uuid import UUID

from pydantic import Field

from tpv.schemas.base import Answer, Request

WorkerState = Literal["ready", "draining", "gone"]


class WorkerReport(Request):
    """What a worker can do, and that it is there; said again every few seconds. Its name tells it from others."""

    name: str = Field(min_length=1, max_length=256)
    state: WorkerState = "ready"
    device: str = Field(max_length=256)
    memory: int | None = Field(None, ge=0, lt=2**63, description="Of the device, in bytes.")
    dtypes: list[str] = Field(default_factory=list, max_length=100, description="Those that are fast on the device.")
    models: list[str] = Field(default_factory=list, max_length=1000, description="Base models that need no download.")
    concurrency: int = Field(1, ge=1, description="Attempts at a time.")
    queues: list[str] | None = Field(None, description="Queues that it takes jobs from; none: all.")
    versions: dict[str, str] = Field(default_factory=dict)


class Worker(Answer):
    """A worker; `gone` when it has said so, or nothing for a while."""

    name: str
    state: WorkerState
    device: str
    memory: int | None  #: bytes
    dtypes: list[str]
    models: list[str]
    concurrency: int
    queues: list[str] | None
    versions: dict[str, str]
    jobs: list[UUID]  #: those that it works on
    actor: str
    created_at: datetime
    last_seen: datetime
