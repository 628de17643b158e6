"""Tables of the jobs: what users see. Queueing, heartbeats and retries are Procrastinate's, in a schema of its own."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, ForeignKeyConstraint, Identity, Index, Text, text
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Mapped, mapped_column, relationship

from tpv_service.db import CreatedAt, Id, Table
from tpv_service.registry.tables import EvaluationRow, VersionRow


class JobRow(Table):
    """One piece of work. Its row lock orders every report and change of state."""

    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint("state in ('queued', 'running', 'succeeded', 'failed', 'cancelled')", name="state"),
        Index(None, "state"),
        Index(None, "output_namespace", "output_name"),
    )

    id: Mapped[Id]
    method: Mapped[str]
    state: Mapped[str]
    reason: Mapped[str | None]
    message: Mapped[str | None]
    spec: Mapped[dict[str, Any]]
    output_namespace: Mapped[str | None]
    output_name: Mapped[str | None]
    queue: Mapped[str]
    priority: Mapped[int]
    prepares: Mapped[bool]  #: submitted for jobs that need it; cancelled with the last of these
    min_memory: Mapped[int | None] = mapped_column(BigInteger)  #: bytes, of the worker's device
    queue_id: Mapped[int | None] = mapped_column(BigInteger)  #: of the queue's own job; None until it is deferred
    attempt: Mapped[int]  #: number of the current attempt, 0 before the first
    lost: Mapped[int]  #: deliveries in a row that came to nothing through no fault of the job, and no checkpoint
    progress: Mapped[dict[str, Any]]
    metrics: Mapped[dict[str, float]]
    result_version_id: Mapped[UUID | None] = mapped_column(ForeignKey("versions.id"))
    result_initialization_id: Mapped[UUID | None] = mapped_column(ForeignKey("initializations.id"))
    result_created: Mapped[bool | None]
    artifact: Mapped[str | None]  #: digest of the stored safetensors file, where the result is one
    artifact_size: Mapped[int | None] = mapped_column(BigInteger)
    provenance: Mapped[dict[str, Any] | None]  #: of a result that is no version
    actor: Mapped[str]
    created_at: Mapped[CreatedAt]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    reported_at: Mapped[datetime | None]  #: when the current attempt last said anything, by the service's clock

    @property
    def output(self) -> str | None:
        return f"{self.output_namespace}/{self.output_name}" if self.output_name else None

    attempts: Mapped[list[AttemptRow]] = relationship(lazy="raise", order_by="AttemptRow.number")
    needs: Mapped[list[NeedRow]] = relationship(
        lazy="raise", foreign_keys="NeedRow.job_id", order_by="NeedRow.needs_id"
    )
    result_version: Mapped[VersionRow | None] = relationship(lazy="raise", foreign_keys=result_version_id)
    evaluations: Mapped[list[EvaluationRow]] = relationship(lazy="raise", order_by="EvaluationRow.id")


class NeedRow(Table):
    """`job_id` waits until `needs_id` has succeeded."""

    __tablename__ = "job_needs"
    __table_args__ = (Index(None, "needs_id"),)

    job_id: Mapped[UUID] = mapped_column(ForeignKey(JobRow.id), primary_key=True)
    needs_id: Mapped[UUID] = mapped_column(ForeignKey(JobRow.id), primary_key=True)

    needed: Mapped[JobRow] = relationship(lazy="raise", foreign_keys=needs_id)


class AttemptRow(Table):
    """One try at a job by one worker; its number fences its reports."""

    __tablename__ = "attempts"
    __table_args__ = (Index(None, "worker", postgresql_where=text("state = 'running'")),)

    job_id: Mapped[UUID] = mapped_column(ForeignKey(JobRow.id), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    worker: Mapped[str]  #: as it calls itself
    actor: Mapped[str]  #: the name of its token
    state: Mapped[str]
    reason: Mapped[str | None]
    message: Mapped[str | None]
    started_at: Mapped[CreatedAt]
    finished_at: Mapped[datetime | None]


class WorkerRow(Table):
    """What a worker said of itself last."""

    __tablename__ = "workers"

    name: Mapped[str] = mapped_column(primary_key=True)
    state: Mapped[str]
    device: Mapped[str]
    memory: Mapped[int | None] = mapped_column(BigInteger)
    dtypes: Mapped[list[str]]
    models: Mapped[list[str]]
    concurrency: Mapped[int]
    queues: Mapped[list[str] | None] = mapped_column(ARRAY(Text()))
    versions: Mapped[dict[str, str]]
    actor: Mapped[str]
    created_at: Mapped[CreatedAt]
    last_seen: Mapped[datetime]


class EventRow(Table):
    """What happened to a job. Written under the job's row lock, so ids of one job grow in commit order."""

    __tablename__ = "job_events"
    __table_args__ = (Index(None, "job_id", "id"),)

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    job_id: Mapped[UUID] = mapped_column(ForeignKey(JobRow.id))
    attempt: Mapped[int | None]
    type: Mapped[str]
    at: Mapped[CreatedAt]
    data: Mapped[dict[str, Any]]


class CheckpointRow(Table):
    """The state of an attempt's training after a step; the newest two of a job are kept while it may go on."""

    __tablename__ = "checkpoints"
    __table_args__ = (ForeignKeyConstraint(["job_id", "attempt"], ["attempts.job_id", "attempts.number"]),)

    job_id: Mapped[UUID] = mapped_column(primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)
    digest: Mapped[str]
    size: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[CreatedAt]


class StagedRow(Table):
    """A file that an attempt has stored; only such files can become part of its result."""

    __tablename__ = "staged_files"
    __table_args__ = (ForeignKeyConstraint(["job_id", "attempt"], ["attempts.job_id", "attempts.number"]),)

    job_id: Mapped[UUID] = mapped_column(primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(primary_key=True)
    size: Mapped[int]
