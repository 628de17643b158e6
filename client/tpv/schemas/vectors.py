"""Vectors, their versions, aliases and evaluations on the wire."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from pydantic import BeforeValidator, Field

from tpv.schemas.base import Answer, Name, Request, Tags


class EvaluationCreate(Request):
    """One measured figure of a version."""

    dataset: str = Field(min_length=1, max_length=512)
    split: str = Field("validation", max_length=64)
    metric: str = Field(min_length=1, max_length=64)
    value: float = Field(allow_inf_nan=False)
    seed: int | None = None
    n: int | None = Field(None, ge=1, description="Rows that the figure was measured on.")


class Evaluation(Answer):
    id: UUID
    dataset: str
    split: str
    metric: str
    value: float
    seed: int | None
    n: int | None
    job: UUID | None
    predictions: str | None  #: digest of the JSONL file with one prediction a row
    created_at: datetime


class Parent(Request):
    """An edge of the lineage: what a version was made from."""

    reference: str
    fingerprint: str | None = None
    role: str = Field("source", description="source, target or term (of a combination)")
    weight: float | None = None


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class VersionMetadata(Request):
    """What a registration tells of a vector beside its tensor."""

    task: Annotated[list[str], BeforeValidator(_as_list)] = Field(default_factory=list, max_length=64)
    task_type: str | None = Field(None, max_length=128)
    description: str | None = Field(None, max_length=10_000)
    tags: Tags = Field(default_factory=dict)
    metrics: list[EvaluationCreate] = Field(default_factory=list, max_length=1000)
    method: str | None = Field(None, max_length=128)
    hyperparameters: dict[str, Any] = Field(default_factory=dict)
    dataset_fingerprint: str | None = None
    provenance: dict[str, Any] = Field(default_factory=dict)


class VersionCreate(VersionMetadata):
    """The `metadata` part of a registration; the file holds one tensor, `prompt` (P*) or `vector` (T), (r, d)."""

    initialization: str = Field(description="Name, id or fingerprint of the shared initialization.")
    fingerprint: str | None = Field(None, description="What the sender believes T's fingerprint to be; checked.")
    parents: list[Parent] = Field(default_factory=list, max_length=1000)


class InitializationSummary(Answer):
    id: UUID
    namespace: str
    name: str | None
    fingerprint: str
    base_model: str
    num_virtual_tokens: int
    token_dim: int


class Version(Answer):
    """One immutable version of a vector."""

    id: UUID
    namespace: str
    name: str
    version: int
    created: bool = False  #: by this request; False: the same content was there already
    fingerprint: str  #: of T
    prompt_fingerprint: str  #: of P*
    reconstruction_error: float  #: max|P* - (P_init + T)|
    initialization: InitializationSummary
    digest: str  #: of the stored file, its ETag
    size: int  #: bytes of the stored file
    norm: float
    method: str | None
    hyperparameters: dict[str, Any]
    dataset_fingerprint: str | None
    state: str | None = None  #: digest of the method's own tensors, where the method keeps any
    provenance: dict[str, Any]
    parents: list[Parent]
    evaluations: list[Evaluation]
    aliases: list[str]
    job: UUID | None
    actor: str
    created_at: datetime
    deleted_at: datetime | None

    @property
    def reference(self) -> str:
        """`namespace/name:version`, which always means this version."""
        return f"{self.namespace}/{self.name}:{self.version}"


class Vector(Answer):
    """A named vector: what its versions share, and what may change."""

    id: UUID
    namespace: str
    name: str
    tasks: list[str]
    task_type: str | None
    description: str | None
    tags: dict[str, str]
    aliases: dict[str, int]
    base_models: list[str]
    newest_version: int | None  #: not deleted
    actor: str
    created_at: datetime
    deleted_at: datetime | None


class VectorUpdate(Request):
    """Only what is given changes; `tags` replaces all tags."""

    description: str | None = Field(None, max_length=10_000)
    task_type: str | None = Field(None, max_length=128)
    tags: Tags | None = None


class AliasSet(Request):
    version: int = Field(ge=1)
    expected_version: int | None = Field(None, ge=1, description="Refuse (409) unless the alias is there now.")
    reason: str | None = Field(None, max_length=1000)


class Alias(Answer):
    alias: Name
    version: int


class AliasChange(Answer):
    """One move of an alias; `to_version` is None when it was removed."""

    alias: str
    from_version: int | None
    to_version: int | None
    actor: str
    reason: str | None
    at: datetime
