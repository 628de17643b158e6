"""Similarity and grouping queries on the wire."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Base64Bytes, Field, model_validator

from tpv.grouping import Strategy
from tpv.schemas.base import Answer, Request
from tpv.schemas.filters import VERSIONS_HELP, Filter, Versions
from tpv.schemas.vectors import InitializationSummary
from tpv.similarity import Metric

MATRIX_LIMIT = 1000  #: vectors of one matrix
FLAT_LIMIT = 200  #: vectors whose whole tensors are compared at a time
EF_SEARCH = 200  #: unless a request says otherwise
LISTED = 100  #: exclusions and decisions that an answer lists
ANSWER_LIMIT = 100_000  #: members of groups and decisions, together, that one answer has at most


class Pool(Request):
    """Which vectors a query looks at: the references, or what passes the filter; both left out, the whole family.

    A family are the vectors of one initialization. A vector's newest version is the newest of that family.
    """

    references: list[str] | None = Field(None, min_length=1, max_length=10_000)
    filter: Filter | None = None
    versions: Versions = Field("newest", description=VERSIONS_HELP)

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.references is not None and self.model_fields_set & {"filter", "versions"}:
            raise ValueError("give references, or a filter and versions, not both")
        return self


class ReferencePool(Answer):
    """The vectors whose mean a centred metric has subtracted."""

    rule: str
    size: int


class PoolEcho(Answer):
    """What a query really looked at."""

    rule: str
    metric: str
    initialization: InitializationSummary
    mixed_initializations: list[InitializationSummary] = Field(
        default_factory=list
    )  #: those of the pool, when other ones than that are there
    size: int
    excluded: dict[str, str]  #: reference -> why it was left out; a hundred of them
    excluded_total: int
    exact: bool  #: False: an index, or a shortlist, was asked first
    how: str  #: in words
    reference_pool: ReferencePool | None = None  #: of a centred metric


class Term(Request):
    """One vector of a combination, with its weight."""

    vector: str
    weight: float = Field(1.0, allow_inf_nan=False)


class Uploaded(Request):
    """A vector that is not registered: a safetensors file with one tensor, `prompt` (P*) or `vector` (T), (r, d)."""

    file: Base64Bytes = Field(max_length=32 * 1024**2)
    initialization: str


class SearchRequest(Request):
    query: str | list[Term] | Uploaded = Field(
        description="A reference, a combination of vectors (the sum of weight times T), or an uploaded vector."
    )
    k: int = Field(10, ge=1, le=1000)
    metric: Metric = "dot"
    candidates: Pool = Field(default_factory=Pool)
    reference_pool: Pool | None = Field(
        None,
        description="For the centred metrics: its mean is subtracted. Default: the newest version of each vector of "
        "the initialization, the query left out.",
    )
    allow_same_task: bool = False
    allow_mixed_initializations: bool = Field(
        False, description="Compare vectors of other initializations of the same base model and shape too."
    )
    accuracy: Literal["auto", "exact", "approximate"] = Field(
        "auto", description="approximate asks the index (`dot` alone); auto does where to compare all takes far longer."
    )
    ef_search: int = Field(EF_SEARCH, ge=1, le=1000, description="How thoroughly the index is searched.")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if isinstance(self.query, list) and not 1 <= len(self.query) <= 1000:
            raise ValueError("a combination has 1 to 1000 terms")
        _check_centre(self.metric, self.reference_pool)
        if self.accuracy == "approximate" and self.metric != "dot":
            raise ValueError(f"there is an index for the metric dot alone; {self.metric} is exact")
        return self


class Hit(Answer):
    reference: str
    similarity: float
    tasks: list[str]
    task_type: str | None


class SearchAnswer(Answer):
    query: str
    hits: list[Hit]
    pool: PoolEcho


class MatrixRequest(Pool):
    """References, or a filter and versions, say which vectors are compared."""

    references: list[str] | None = Field(None, min_length=1, max_length=MATRIX_LIMIT)
    metric: Metric = "dot"
    reference_pool: Pool | None = Field(None, description="As in a search; default: the whole family.")
    allow_mixed_initializations: bool = False
    normalize: bool = Field(False, description="Min-max over the matrix, as in the DTVG paper's Fig. 10 and 11.")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        _check_centre(self.metric, self.reference_pool)
        if self.references is None and self.filter is None:
            raise ValueError("say which vectors are compared: references, or a filter")
        return self

    @property
    def limit(self) -> int:
        """How many vectors this metric compares at most."""
        return FLAT_LIMIT if self.metric == "cosine-flat" else MATRIX_LIMIT


class MatrixAnswer(Answer):
    """`matrix[i][j]` compares references i and j, exactly."""

    references: list[str]
    matrix: list[list[float]]
    order: list[int]  #: of rows and columns, so that similar ones are neighbours (average linkage)
    metric: str
    normalized: bool
    exact: Literal[True] = True
    reference_pool: ReferencePool | None = None  #: of a centred metric
    initialization: InitializationSummary
    mixed_initializations: list[InitializationSummary] = Field(default_factory=list)


class GroupingRequest(Request):
    target: str | list[str] = Field(description="One vector, or up to 100; several give `items`, one a target.")
    candidates: Pool = Field(default_factory=Pool)
    strategy: Strategy = "greedy"
    trade_off: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="Weight of KC (Eq. 5). Only `exact` chooses by it; with `compare` it weighs in every objective.",
    )
    max_size: int | None = Field(None, ge=0)
    min_similarity: float | None = Field(None, allow_inf_nan=False)
    allow_same_task: bool = False
    allow_mixed_initializations: bool = False
    compare: bool = Field(False, description="Also what every other strategy would choose.")
    trace: Literal["top", "all"] = Field("top", description=f"top: the first {LISTED} decisions, and all that took.")

    @model_validator(mode="before")
    @classmethod
    def _plain_list(cls, values: object) -> object:
        """A plain list of candidates means these references."""
        if isinstance(values, dict) and isinstance(values.get("candidates"), list):
            return {**values, "candidates": {"references": values["candidates"]}}
        return values

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if isinstance(self.target, list) and not 1 <= len(self.target) <= 100:
            raise ValueError("name 1 to 100 targets")
        if self.trade_off is not None and self.strategy != "exact" and not self.compare:
            raise ValueError(f"trade_off matters to the strategy exact alone, not to {self.strategy}")
        if self.strategy == "top-k" and self.max_size is None:
            raise ValueError("top-k needs max_size, which is its k")
        return self


class Member(Answer):
    reference: str
    similarity: float


class TraceEntry(Answer):
    reference: str
    rank: int
    similarity: float
    consistency_before: float | None
    consistency_after: float | None
    taken: bool
    reason: str


class StrategyResult(Answer):
    """What one strategy chooses from the same pool; `refused` says why it does not."""

    strategy: str
    size: int
    members: list[str]  #: the first hundred
    target_similarity: float | None
    knowledge_consistency: float | None
    objective: float | None
    refused: str | None = None


class GroupingAnswer(Answer):
    target: str
    members: list[Member]
    target_similarity: float
    knowledge_consistency: float
    objective: float  #: TS + trade_off * KC
    strategy: str
    trade_off: float = 1.0
    max_size: int | None = None  #: as asked
    min_similarity: float | None = None  #: as asked; None: the strategy's own bound
    trace: list[TraceEntry]
    trace_total: int  #: decisions there were; more than are listed in `trace` when it is cut
    comparison: list[StrategyResult] | None = None
    pool: PoolEcho


class GroupingsAnswer(Answer):
    """One grouping for each target, in their order."""

    items: list[GroupingAnswer]


def _check_centre(metric: Metric, reference_pool: Pool | None) -> None:
    if reference_pool is not None and not metric.endswith("-centered"):
        raise ValueError(f"reference_pool belongs to the centred metrics, not to {metric}")
