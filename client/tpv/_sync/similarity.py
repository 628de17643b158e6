# Generated from client/tpv/_async/similarity.py by scripts/unasync.py; change that file instead.
# ruff: noqa
# fmt: off
"""`client.similarity` and `client.groupings`: which tasks are close, and which help a target together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tpv import _base, _paths
from tpv._sync.http import Http
from tpv._paths import VectorLike
from tpv.schemas.similarity import (
    GroupingAnswer,
    GroupingRequest,
    MatrixAnswer,
    MatrixRequest,
    Pool,
    SearchAnswer,
    SearchRequest,
)

Candidates = Pool | Sequence[VectorLike] | None  #: these vectors, or all that pass a filter


class Similarity:
    """`client.similarity`: how close tasks are, by their vectors."""

    def __init__(self, http: Http) -> None:
        self._http = http

    def search(
        self,
        query: VectorLike,
        k: int = 10,
        *,
        candidates: Candidates = None,
        task: str | None = None,
        task_type: str | None = None,
        namespace: str | None = None,
        metric: str | None = None,
        allow_same_task: bool | None = None,
    ) -> SearchAnswer:
        """The k vectors most similar to the query, best first; the query itself and its own task are left out."""
        pool = _pool(candidates, task=task, task_type=task_type, namespace=namespace)
        members = _base.given(candidates=pool, metric=metric, allow_same_task=allow_same_task)
        request = _base.message(SearchRequest, query=_paths.reference_of(query), k=k, **members)
        return self._http.post(SearchAnswer, "/similarity/search", request, idempotent=True)

    def matrix(self, references: Iterable[VectorLike], *, metric: str | None = None) -> MatrixAnswer:
        """All similarities between these vectors: `matrix[i][j]` compares references i and j."""
        members = _base.given(references=[_paths.reference_of(ref) for ref in references], metric=metric)
        request = _base.message(MatrixRequest, **members)
        return self._http.post(MatrixAnswer, "/similarity/matrix", request, idempotent=True)


class Groupings:
    """`client.groupings`: which source tasks help a target together."""

    def __init__(self, http: Http) -> None:
        self._http = http

    def create(
        self,
        target: VectorLike,
        candidates: Candidates = None,
        *,
        task: str | None = None,
        task_type: str | None = None,
        namespace: str | None = None,
        strategy: str | None = None,
        max_size: int | None = None,
        min_similarity: float | None = None,
        allow_same_task: bool | None = None,
    ) -> GroupingAnswer:
        """The group for a target, in order, with its figures and the trace of decisions."""
        members = _base.given(
            candidates=_pool(candidates, task=task, task_type=task_type, namespace=namespace),
            strategy=strategy,
            max_size=max_size,
            min_similarity=min_similarity,
            allow_same_task=allow_same_task,
        )
        request = _base.message(GroupingRequest, target=_paths.reference_of(target), **members)
        return self._http.post(GroupingAnswer, "/groupings", request, idempotent=True)


def _pool(candidates: Candidates, **filters: Any) -> Pool | None:
    if isinstance(candidates, Pool):
        return candidates
    references = None if candidates is None else [_paths.reference_of(ref) for ref in candidates]
    members = _base.given(references=references, **filters)
    return _base.message(Pool, **members) if members else None
