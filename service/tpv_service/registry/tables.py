"""Tables of the registry."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, ForeignKeyConstraint, Identity, Index, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column, relationship

from tpv_service.db import CreatedAt, Deletable, Id, PooledVector, Table, WrittenBy


class BaseModelRow(Table):
    """A frozen language model: known by its digest, else by name and commit."""

    __tablename__ = "base_models"
    __table_args__ = (UniqueConstraint("digest", "name", "revision", postgresql_nulls_not_distinct=True),)

    id: Mapped[Id]
    name: Mapped[str]
    revision: Mapped[str | None]
    unpinned: Mapped[bool]
    digest: Mapped[str | None]
    embedding_digest: Mapped[str | None]
    architecture: Mapped[str | None]
    token_dim: Mapped[int | None]
    created_at: Mapped[CreatedAt]

    @property
    def verified(self) -> bool:
        return self.digest is not None


class InitializationRow(Table):
    """P_init. Immutable; the same tensor for the same base model is one row."""

    __tablename__ = "initializations"
    __table_args__ = (
        UniqueConstraint("base_model_id", "fingerprint"),
        UniqueConstraint("namespace", "name"),
        Index(None, "fingerprint"),
    )

    id: Mapped[Id]
    namespace: Mapped[str]
    name: Mapped[str | None]
    base_model_id: Mapped[UUID] = mapped_column(ForeignKey(BaseModelRow.id))
    num_virtual_tokens: Mapped[int]
    token_dim: Mapped[int]
    strategy: Mapped[str]
    parameters: Mapped[dict[str, Any]]
    fingerprint: Mapped[str]
    digest: Mapped[str]
    size: Mapped[int]
    actor: Mapped[str]
    created_at: Mapped[CreatedAt]

    base_model: Mapped[BaseModelRow] = relationship(lazy="raise")


class VectorRow(Deletable, Table):
    """A named vector. `last_version` is the counter that its versions are numbered by; its row lock orders writers."""

    __tablename__ = "vectors"
    __table_args__ = (
        UniqueConstraint("namespace", "name"),
        Index(None, "tasks", postgresql_using="gin"),
        Index(None, "tags", postgresql_using="gin"),
    )

    id: Mapped[Id]
    namespace: Mapped[str]
    name: Mapped[str]
    tasks: Mapped[list[str]]
    task_type: Mapped[str | None]
    description: Mapped[str | None]
    tags: Mapped[dict[str, str]]
    last_version: Mapped[int]
    actor: Mapped[str]
    created_at: Mapped[CreatedAt]

    aliases: Mapped[list[AliasRow]] = relationship(lazy="raise", order_by="AliasRow.alias", back_populates="vector")


class VersionRow(Deletable, Table):
    """One immutable version of a vector; the row exists only if its blob is stored and verified."""

    __tablename__ = "versions"
    __table_args__ = (
        UniqueConstraint("vector_id", "number"),
        UniqueConstraint("vector_id", "fingerprint", "initialization_id"),
        Index(None, "initialization_id", "txid"),
        Index(None, "fingerprint"),
        CheckConstraint("number >= 1", name="number"),
    )

    id: Mapped[Id]
    vector_id: Mapped[UUID] = mapped_column(ForeignKey(VectorRow.id))
    number: Mapped[int]
    initialization_id: Mapped[UUID] = mapped_column(ForeignKey(InitializationRow.id))
    fingerprint: Mapped[str]
    prompt_fingerprint: Mapped[str]
    reconstruction_error: Mapped[float]
    digest: Mapped[str]
    size: Mapped[int]
    norm: Mapped[float]
    pooled: Mapped[Any] = mapped_column(PooledVector(), deferred=True)  #: mean over the rows, (token_dim,)
    method: Mapped[str | None]
    hyperparameters: Mapped[dict[str, Any]]
    dataset_fingerprint: Mapped[str | None]
    state: Mapped[str | None]  #: digest of the method's own tensors (T_t and scaling terms of a transfer)
    provenance: Mapped[dict[str, Any]]
    job_id: Mapped[UUID | None] = mapped_column(ForeignKey("jobs.id", use_alter=True))
    actor: Mapped[str]
    created_at: Mapped[CreatedAt]
    txid: Mapped[WrittenBy]

    vector: Mapped[VectorRow] = relationship(lazy="raise")
    initialization: Mapped[InitializationRow] = relationship(lazy="raise")
    aliases: Mapped[list[AliasRow]] = relationship(lazy="raise", order_by="AliasRow.alias", viewonly=True)
    parents: Mapped[list[ParentRow]] = relationship(
        lazy="raise", foreign_keys="ParentRow.version_id", order_by="ParentRow.position"
    )
    evaluations: Mapped[list[EvaluationRow]] = relationship(lazy="raise", order_by="EvaluationRow.id")


class ParentRow(Table):
    """An edge of the lineage: `version_id` was made from `parent_id`."""

    __tablename__ = "parents"
    __table_args__ = (Index(None, "parent_id"),)

    version_id: Mapped[UUID] = mapped_column(ForeignKey(VersionRow.id), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True)
    parent_id: Mapped[UUID] = mapped_column(ForeignKey(VersionRow.id))
    reference: Mapped[str]
    fingerprint: Mapped[str]
    role: Mapped[str]
    weight: Mapped[float | None]


class AliasRow(Table):
    __tablename__ = "aliases"
    __table_args__ = (ForeignKeyConstraint(["vector_id", "version"], ["versions.vector_id", "versions.number"]),)

    vector_id: Mapped[UUID] = mapped_column(ForeignKey(VectorRow.id), primary_key=True)
    alias: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[int]

    vector: Mapped[VectorRow] = relationship(lazy="raise", back_populates="aliases")


class AliasChangeRow(Table):
    """One move of an alias; never changed, never removed."""

    __tablename__ = "alias_changes"
    __table_args__ = (Index(None, "vector_id", "alias"),)

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    vector_id: Mapped[UUID] = mapped_column(ForeignKey(VectorRow.id))
    alias: Mapped[str]
    from_version: Mapped[int | None]
    to_version: Mapped[int | None]
    actor: Mapped[str]
    reason: Mapped[str | None]
    at: Mapped[CreatedAt]


class ChangeRow(Table):
    """One change to a vector or to one of its versions after it was registered: who, when, what. Never changed."""

    __tablename__ = "changes"
    __table_args__ = (Index(None, "vector_id"), Index(None, "txid"))

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    vector_id: Mapped[UUID] = mapped_column(ForeignKey(VectorRow.id))
    version: Mapped[int | None]  #: None: the whole vector
    action: Mapped[str]  #: delete, restore or update
    data: Mapped[dict[str, Any]]
    actor: Mapped[str]
    at: Mapped[CreatedAt]
    txid: Mapped[WrittenBy]


class EvaluationRow(Table):
    """One measured figure of a version, or of a job whose result is none, with its predictions when a job made it."""

    __tablename__ = "evaluations"
    __table_args__ = (
        Index(None, "version_id"),
        Index(None, "job_id"),
        CheckConstraint("version_id is not null or job_id is not null", name="owner"),
    )

    id: Mapped[Id]
    version_id: Mapped[UUID | None] = mapped_column(ForeignKey(VersionRow.id))
    dataset: Mapped[str]
    split: Mapped[str]
    metric: Mapped[str]
    value: Mapped[float]
    seed: Mapped[int | None] = mapped_column(BigInteger)
    n: Mapped[int | None]
    job_id: Mapped[UUID | None] = mapped_column(ForeignKey("jobs.id", use_alter=True))
    predictions: Mapped[str | None]
    created_at: Mapped[CreatedAt]

    @property
    def job(self) -> UUID | None:
        return self.job_id


class IdempotencyRow(Table):
    """The answer to a creating request, kept so that a retry gets the same one."""

    __tablename__ = "idempotency_keys"

    actor: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    request: Mapped[str]  #: digest of what was asked
    status: Mapped[int | None]
    answer: Mapped[dict[str, Any] | None]
    created_at: Mapped[CreatedAt]
