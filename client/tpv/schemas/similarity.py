"""Similarity and grouping queries on the wire."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from tpv.schemas.base import Answer, Request
from tpv.schemas.vectors import InitializationSummary


class Pool(Request):
    """Which vectors a query looks at: the newest not deleted version of each vector that passes.

    With `references`, exactly those; else every vector of the initialization that passes the filter.
    """

    references: list[str] | None = Field(default=None, min_length=1, max_length=10_000)
    task: str | None = None
    task_type: str | None = None
    namespace: str | None = None


class PoolEcho(Answer):
    """What a query really looked at."""

    rule: str
    metric: str
    initialization: InitializationSummary
    size: int
    excluded: dict[str, str]  #: reference -> why it was left out
    exact: bool


class SearchRequest(Request):
    query: str = Field(description="Reference of the vector to compare with.")
    k: int = Field(10, ge=1, le=1000)
    metric: Literal["dot"] = "dot"
    candidates: Pool = Field(default_factory=Pool)
    allow_same_task: bool = False


class Hit(Answer):
    reference: str
    similarity: float
    tasks: list[str]
    task_type: str | None


class SearchAnswer(Answer):
    query: str
    hits: list[Hit]
    pool: PoolEcho


class MatrixRequest(Request):
    references: list[str] = Field(min_length=1, max_length=1000)
    metric: Literal["dot"] = "dot"


class MatrixAnswer(Answer):
    """`matrix[i][j]` compares references i and j."""

    references: list[str]
    matrix: list[list[float]]
    metric: str
    initialization: InitializationSummary


class GroupingRequest(Request):
    target: str
    candidates: Pool = Field(default_factory=Pool)
    strategy: Literal["greedy"] = "greedy"
    max_size: int | None = Field(None, ge=0)
    min_similarity: float | None = None
    allow_same_task: bool = False

    @model_validator(mode="before")
    @classmethod
    def _plain_list(cls, values: object) -> object:
        """A plain list of candidates means these references."""
        if isinstance(values, dict) and isinstance(values.get("candidates"), list):
            return {**values, "candidates": {"references": values["candidates"]}}
        return values


class Member(Answer):
    reference: str
    similarity: float


class TraceEntry(Answer):
    reference: str
    rank: int
    similarity: float
    consistency_before: float
    consistency_after: float
    taken: bool
    reason: str


class GroupingAnswer(Answer):
    target: str
    members: list[Member]
    target_similarity: float
    knowledge_consistency: float
    objective: float
    strategy: str
    trace: list[TraceEntry]
    pool: PoolEcho
