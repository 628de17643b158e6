"""What all messages share: strict requests, tolerant answers, pages."""

from __future__ import annotations

from typing import Annotated, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from tpv.references import NAME_PATTERN

T = TypeVar("T")

Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
Tags = dict[
    Annotated[str, StringConstraints(min_length=1, max_length=128)], Annotated[str, StringConstraints(max_length=1024)]
]


class Request(BaseModel):
    """A request: a member that is not known is an error, so a misspelt one never goes unnoticed."""

    model_config = ConfigDict(extra="forbid")


class Answer(BaseModel):
    """An answer: a member that is not known is ignored, so an older client reads a newer service."""

    model_config = ConfigDict(extra="ignore", from_attributes=True)


class Page(Answer, Generic[T]):
    """One page of a list; `next_cursor` asks for the next one and is None on the last."""

    items: list[T]
    next_cursor: str | None = None


class Paging(Request):
    limit: int = Field(100, ge=1, le=1000)
    cursor: str | None = None
