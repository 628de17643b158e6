"""`client.similarity` and `client.groupings`: which tasks are close, and which help a target together."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Unpack

from tpv import _base, _paths, files
from tpv._async.http import AsyncHttp
from tpv._filters import Conditions, filter_of
from tpv._paths import VectorLike
from tpv.grouping import Strategy
from tpv.schemas.filters import Filter
from tpv.schemas.similarity import (
    GroupingAnswer,
    GroupingRequest,
    GroupingsAnswer,
    MatrixAnswer,
    MatrixRequest,
    Pool,
    SearchAnswer,
    SearchRequest,
)
from tpv.similarity import Metric
from tpv.vectors import TaskPromptVector

Candidates = Pool | Filter | Iterable[VectorLike] | None  #: these vectors, or all that pass a filter
QueryLike = VectorLike | TaskPromptVector | Mapping[str, float] | Sequence[tuple[VectorLike, float]]


class AsyncSimilarity:
    """`client.similarity`: how close tasks are, by their vectors."""

    def __init__(self, http: AsyncHttp) -> None:
        self._http = http

    async def search(
        self,
        query: QueryLike,
        k: int = 10,
        *,
        candidates: Candidates = None,
        versions: str | None = None,
        metric: Metric | None = None,
        reference_pool: Candidates = None,
        allow_same_task: bool | None = None,
        allow_mixed_initializations: bool | None = None,
        accuracy: str | None = None,
        ef_search: int | None = None,
        **conditions: Unpack[Conditions],
    ) -> SearchAnswer:
        """The k vectors most similar to the query, best first; the query itself and its own task are left out.

        The query is a reference, a combination (`{"mnli": 1, "rte": -1}`, or pairs), or a TaskPromptVector that need
        not be registered. Candidates are references, a Filter, or the newest version of each vector of the
        initialization; `task="nli"` and the like are short for a filter. `accuracy` is auto, exact or approximate.
        """
        members = _base.given(
            candidates=pool_of(candidates, versions=versions, conditions=conditions),
            metric=metric,
            reference_pool=pool_of(reference_pool),
            allow_same_task=allow_same_task,
            allow_mixed_initializations=allow_mixed_initializations,
            accuracy=accuracy,
            ef_search=ef_search,
        )
        request = _base.message(SearchRequest, query=_query(query), k=k, **members)
        return await self._http.post(SearchAnswer, "/similarity/search", request, idempotent=True)

    async def matrix(
        self,
        references: Candidates = None,
        *,
        versions: str | None = None,
        metric: Metric | None = None,
        reference_pool: Candidates = None,
        normalize: bool | None = None,
        allow_mixed_initializations: bool | None = None,
        **conditions: Unpack[Conditions],
    ) -> MatrixAnswer:
        """All similarities between these vectors: `matrix[i][j]` compares the answer's references i and j.

        Instead of references, a Filter or conditions say which vectors; these come by name. `order` puts similar ones
        side by side; `normalize` maps the smallest to 0 and the largest to 1.
        """
        pool = pool_of(references, versions=versions, conditions=conditions)
        members = _base.given(
            **(pool.model_dump(exclude_unset=True) if pool else {}),
            metric=metric,
            reference_pool=pool_of(reference_pool),
            normalize=normalize,
            allow_mixed_initializations=allow_mixed_initializations,
        )
        request = _base.message(MatrixRequest, **members)
        return await self._http.post(MatrixAnswer, "/similarity/matrix", request, idempotent=True)


class AsyncGroupings:
    """`client.groupings`: which source tasks help a target together."""

    def __init__(self, http: AsyncHttp) -> None:
        self._http = http

    async def create(
        self,
        target: VectorLike,
        candidates: Candidates = None,
        *,
        versions: str | None = None,
        strategy: Strategy | None = None,
        trade_off: float | None = None,
        max_size: int | None = None,
        min_similarity: float | None = None,
        allow_same_task: bool | None = None,
        allow_mixed_initializations: bool | None = None,
        compare: bool | None = None,
        trace: str | None = None,
        **conditions: Unpack[Conditions],
    ) -> GroupingAnswer:
        """The group for a target, in order, with its figures and the trace of decisions.

        `compare` adds what every other strategy would choose. Of a large pool the trace lists the first hundred
        decisions and every source taken, unless `trace="all"`.
        """
        members = _base.given(
            candidates=pool_of(candidates, versions=versions, conditions=conditions),
            strategy=strategy,
            trade_off=trade_off,
            max_size=max_size,
            min_similarity=min_similarity,
            allow_same_task=allow_same_task,
            allow_mixed_initializations=allow_mixed_initializations,
            compare=compare,
            trace=trace,
        )
        request = _base.message(GroupingRequest, target=_paths.reference_of(target), **members)
        return await self._http.post(GroupingAnswer, "/groupings", request, idempotent=True)

    async def create_many(
        self, targets: Iterable[VectorLike], candidates: Candidates = None, **options: Any
    ) -> list[GroupingAnswer]:
        """The group of each target, from one request; the options are those of `create`."""
        conditions = {key: options.pop(key) for key in Conditions.__annotations__ if key in options}
        pool = pool_of(candidates, versions=options.pop("versions", None), conditions=conditions)
        members = _base.given(candidates=pool, **options)
        request = _base.message(GroupingRequest, target=[_paths.reference_of(ref) for ref in targets], **members)
        answer = await self._http.post(GroupingsAnswer, "/groupings", request, idempotent=True)
        return answer.items


def _query(query: QueryLike) -> str | dict[str, Any] | list[dict[str, Any]]:
    """The query of a search as the wire has it."""
    if isinstance(query, TaskPromptVector):
        content = base64.b64encode(files.dump({"vector": query.tensor}))
        return {"file": content, "initialization": query.initialization}
    if isinstance(query, Mapping):
        query = list(query.items())
    if isinstance(query, Sequence) and not isinstance(query, str):
        return [{"vector": _paths.reference_of(vector), "weight": weight} for vector, weight in query]
    return _paths.reference_of(query)


def pool_of(
    candidates: Candidates, *, versions: str | None = None, conditions: Mapping[str, Any] | None = None
) -> Pool | None:
    """The vectors that a request looks at, as the wire has them; None when nothing is said."""
    if isinstance(candidates, Pool):
        if versions or _base.given(**(conditions or {})):
            raise TypeError("a Pool says all by itself: leave out versions= and conditions, or put them into it")
        return candidates
    if isinstance(candidates, str):
        candidates = [candidates]
    chosen, references = (candidates, None) if isinstance(candidates, Filter) else (None, candidates)
    members = _base.given(
        references=None if references is None else [_paths.reference_of(ref) for ref in references],
        filter=filter_of(chosen, conditions or {}),
        versions=versions,
    )
    return _base.message(Pool, **members) if members else None
