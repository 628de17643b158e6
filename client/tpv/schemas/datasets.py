"""Uploaded data sets on the wire: JSON Lines with `source` and `target`, one file a split."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated
from uuid import UUID

from pydantic import Field, StringConstraints

from tpv.schemas.base import Answer, Request

SplitName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,31}$")]


class DatasetCreate(Request):
    """The `metadata` part of an upload; each further part is a split, named `train`, `validation`, `test`."""

    label_words: list[str] | None = Field(
        None, min_length=2, description="The answers among which the most likely is chosen; none: text is generated."
    )
    metric: str = Field("accuracy", pattern="^accuracy$")
    description: str | None = Field(None, max_length=10_000)


class Split(Answer):
    name: SplitName
    rows: int
    fingerprint: str  #: sha256 of the stored file, its ETag too
    size: int  #: bytes


class Dataset(Answer):
    """One version of a data set."""

    id: UUID
    namespace: str
    name: str
    version: int
    created: bool = False
    label_words: list[str] | None
    metric: str
    description: str | None
    splits: list[Split]
    fingerprint: str  #: over the splits' names and fingerprints, the label words and the metric
    actor: str
    created_at: datetime

    @property
    def reference(self) -> str:
        return f"{self.namespace}/{self.name}:{self.version}"
