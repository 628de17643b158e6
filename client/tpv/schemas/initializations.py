"""Initializations and base models on the wire."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any, Literal, Self
from uuid import UUID

from pydantic import Field, StringConstraints, model_validator

from tpv.schemas.base import Answer, Name, Request

MAX_TOKEN_DIM = 16_000  #: what one vector column of the database holds

Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]


class BaseModelReference(Request):
    """A base model as a user names it: a hub id with its commit, or a local directory that workers may read."""

    id: str = Field(min_length=1, max_length=1024)
    revision: str | None = Field(None, max_length=256)
    unpinned: bool = Field(False, description="Accept a model without a commit; shown wherever the model is.")

    @model_validator(mode="after")
    def _pinned(self) -> Self:
        """A branch moves, so it does not say which model it is; of a local directory the digest says it."""
        local = self.id.startswith("/")
        if self.revision and not (self.unpinned or local or re.fullmatch(r"[0-9a-f]{40}", self.revision)):
            raise ValueError(
                f"revision {self.revision!r} is no commit (40 hexadecimal digits); a branch or tag may move: "
                "to take it all the same, say unpinned: true"
            )
        return self


class BaseModelFacts(Request):
    """What was read off the model itself, by a worker or by the uploader."""

    digest: str | None = Field(
        default=None, description="sha256 of weights and config; none: the model stays `unverified`."
    )
    embedding_digest: str | None = None
    architecture: str | None = None
    token_dim: int | None = Field(default=None, ge=1)


class BaseModel(Answer):
    id: UUID
    name: str  #: hub id or local path, a label
    revision: str | None
    unpinned: bool
    verified: bool
    digest: str | None
    embedding_digest: str | None
    architecture: str | None
    token_dim: int | None


class InitializationCreate(Request):
    """The `metadata` part of an uploaded initialization; the file holds the tensor `prompt` (r, d)."""

    name: Name | None = None
    namespace: Name = "default"
    base_model: BaseModelReference
    base_model_facts: BaseModelFacts = Field(default_factory=BaseModelFacts)
    strategy: Literal["imported"] = "imported"
    fingerprint: str | None = Field(None, description="What the sender believes the tensor's fingerprint to be.")


class Initialization(Answer):
    id: UUID
    namespace: str
    name: str | None
    base_model: BaseModel
    num_virtual_tokens: int
    token_dim: int
    strategy: str
    parameters: dict[str, Any]  #: how it was drawn: top_k, seed, range, text
    fingerprint: str
    digest: str  #: of the stored file
    actor: str
    created_at: datetime
    created: bool = False  #: by this request; False: it was there already
