"""Tables of the data sets."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import ForeignKey, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column, relationship

from tpv_service.db import CreatedAt, Id, Table


class DatasetRow(Table):
    """A named data set; `last_version` numbers its versions, its row lock orders writers."""

    __tablename__ = "datasets"
    __table_args__ = (UniqueConstraint("namespace", "name"),)

    id: Mapped[Id]
    namespace: Mapped[str]
    name: Mapped[str]
    last_version: Mapped[int]
    actor: Mapped[str]
    created_at: Mapped[CreatedAt]


class DatasetVersionRow(Table):
    __tablename__ = "dataset_versions"
    __table_args__ = (UniqueConstraint("dataset_id", "number"), UniqueConstraint("dataset_id", "fingerprint"))

    id: Mapped[Id]
    dataset_id: Mapped[UUID] = mapped_column(ForeignKey(DatasetRow.id))
    number: Mapped[int]
    label_words: Mapped[list[str] | None]
    metric: Mapped[str]
    description: Mapped[str | None]
    fingerprint: Mapped[str]
    actor: Mapped[str]
    created_at: Mapped[CreatedAt]

    dataset: Mapped[DatasetRow] = relationship(lazy="raise")
    splits: Mapped[list[SplitRow]] = relationship(lazy="raise", order_by="SplitRow.name")


class SplitRow(Table):
    """One JSONL file; `fingerprint` is the digest of its blob."""

    __tablename__ = "dataset_splits"

    dataset_version_id: Mapped[UUID] = mapped_column(ForeignKey(DatasetVersionRow.id), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    rows: Mapped[int]
    fingerprint: Mapped[str]
    size: Mapped[int]
