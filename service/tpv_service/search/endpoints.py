"""Which vectors are alike, and which of them help a target together."""

from __future__ import annotations

import csv
from io import StringIO
from typing import Annotated, Any, Literal, NamedTuple
from uuid import UUID

import numpy as np
from fastapi import APIRouter, Depends, Request
from fastapi import Query as QueryParameter
from fastapi.responses import Response
from numpy.typing import NDArray
from starlette.concurrency import run_in_threadpool

from tpv import grouping
from tpv.errors import Conflict, Invalid
from tpv.schemas.filters import Filter
from tpv.schemas.similarity import (
    ANSWER_LIMIT,
    EF_SEARCH,
    FLAT_LIMIT,
    LISTED,
    MATRIX_LIMIT,
    GroupingAnswer,
    GroupingRequest,
    GroupingsAnswer,
    Hit,
    MatrixAnswer,
    MatrixRequest,
    Member,
    ReferencePool,
    SearchAnswer,
    SearchRequest,
    StrategyResult,
    TraceEntry,
)
from tpv_service.auth.tokens import Actor, Allowed
from tpv_service.db import ReadOnlySession, release
from tpv_service.registry import queries as registry
from tpv_service.registry.compatibility import check_same_initialization, label
from tpv_service.registry.filters import chosen, condition
from tpv_service.registry.tables import VectorRow, VersionRow
from tpv_service.registry.views import initialization_summary, version_reference
from tpv_service.search import indexes, scores
from tpv_service.search.family import Float32, Mask, Rows, as_bytes, by_age
from tpv_service.search.queries import (
    ALL_COMPARED,
    Candidates,
    Query,
    choose,
    leave_out,
    named,
    pooled_of,
    read_query,
    whole_pool,
)

router = APIRouter(tags=["similarity"])
Reader = Annotated[Actor, Depends(Allowed("read", "write", "worker"))]


@router.post("/similarity/search")
async def search(request: Request, session: ReadOnlySession, _: Reader, asked: SearchRequest) -> SearchAnswer:
    """The k vectors most similar to one, to a combination, or to an uploaded one; ties in the order of references.

    Of more than a thousand that are equal in the last place, the oldest are looked at.
    """
    mixed = asked.allow_mixed_initializations
    query = await read_query(request, session, asked.query, mixed=mixed)
    pool = await choose(request, session, query, asked.candidates, allow_same_task=asked.allow_same_task, mixed=mixed)
    found = await _nearest(request, session, query, pool, asked)
    shown = await named(session, [*pool.ids[found.rows], *pool.excluded])
    hits = sorted(
        (
            (shown[bytes(pool.ids[row])], float(value))
            for row, value in zip(found.rows, found.similarities, strict=True)
        ),
        key=lambda hit: (-hit[1], hit[0].reference),
    )
    return SearchAnswer(
        query=query.label,
        hits=[
            Hit(reference=of.reference, similarity=similarity, tasks=of.tasks, task_type=of.task_type)
            for of, similarity in hits[: asked.k]
        ],
        pool=pool.echo(
            asked.metric, query, shown, how=found.how, exact=found.exact, reference_pool=found.reference_pool
        ),
    )


class _Found(NamedTuple):
    """Rows of the pool that may be among the best k."""

    rows: Rows
    similarities: NDArray[np.float32]
    how: str = ALL_COMPARED
    exact: bool = True
    reference_pool: ReferencePool | None = None


async def _nearest(
    request: Request, session: ReadOnlySession, query: Query, pool: Candidates, asked: SearchRequest
) -> _Found:
    if asked.metric == "cosine-flat":
        return await _nearest_flat(request, session, query, pool, asked)
    family, indexed = query.initialization.id, None
    if asked.metric == "dot":
        await release(session)
        if asked.accuracy != "approximate" and (found := await run_in_threadpool(_by_sketch, query, pool, asked.k)):
            return found
        if asked.accuracy != "exact":
            indexed = await _by_index(request, session, query, pool, asked)
        if indexed and (asked.accuracy == "approximate" or request.state.indexes.trusted(family, len(pool.matrix))):
            return indexed
    others = [*query.others, *pool.mixed]
    measure = await scores.measure(request, session, asked.metric, query, asked.reference_pool, others)
    await release(session)
    target, matrix = query.pooled, pool.matrix
    if asked.metric == "cosine-prompt" and pool.mixed:  # each soft prompt has a P_init of its own
        start, *others = await scores.starts(request, [query.initialization, *pool.mixed])
        measure, target, matrix = scores.Measure(metric="cosine"), target + start, matrix + np.array(others)
    found = await run_in_threadpool(_by_comparing_all, measure, target, matrix, pool.ids, pool.where, asked.k)
    if indexed and asked.ef_search == EF_SEARCH:  # others say nothing of the usual ones
        request.state.indexes.tried(family, len(pool.matrix), query.pooled, _recall(found, indexed, asked.k))
    return found


def _recall(exact: _Found, found: _Found, k: int) -> float:
    """The share of the k best similarities that were found; which of equal ones gave them does not matter."""
    best, others = (np.sort(one.similarities)[::-1][:k] for one in (exact, found))
    return float(np.count_nonzero(others >= best[-1]) / len(best)) if len(best) else 1.0


def _by_comparing_all(
    measure: scores.Measure, target: Float32, matrix: Float32, ids: NDArray[Any], where: Mask, k: int
) -> _Found:
    similarities = measure.one_with_many(target, matrix, where)
    rows = scores.best(similarities, where, ids, k)
    return _Found(rows, similarities[rows], reference_pool=measure.reference_pool)


def _by_sketch(query: Query, pool: Candidates, k: int) -> _Found | None:
    """Exactly the best k, found without comparing all; None when that is not possible."""
    if pool.snapshot is None or pool.snapshot.sketch is None:
        return None
    rows = pool.snapshot.sketch.promising(pool.matrix, query.pooled, pool.where, k)
    if rows is None:
        return None
    return _compared(query, pool, rows, k, how=f"a bound ruled out all but {len(rows)}, which were compared")


def _compared(query: Query, pool: Candidates, rows: Rows, k: int, *, how: str, exact: bool = True) -> _Found:
    """The best k of some candidates, by `dot`."""
    everywhere, dot = np.ones(len(rows), dtype=bool), scores.Measure(metric="dot")
    found = _by_comparing_all(dot, query.pooled, pool.matrix[rows], pool.ids[rows], everywhere, k)
    return _Found(rows[found.rows], found.similarities, how, exact)


async def _nearest_flat(
    request: Request, session: ReadOnlySession, query: Query, pool: Candidates, asked: SearchRequest
) -> _Found:
    rows, how, exact = np.flatnonzero(pool.where), ALL_COMPARED, True
    if len(rows) > FLAT_LIMIT and asked.accuracy == "exact":
        raise Invalid(
            f"cosine-flat reads vectors whole, exactly at most {FLAT_LIMIT}; here are {len(rows)} candidates: narrow "
            "them by a filter, or take accuracy auto, which compares those whole that look similar"
        )
    if len(rows) > FLAT_LIMIT:
        await release(session)
        cosines = scores.Measure(metric="cosine")
        similarities = await run_in_threadpool(cosines.one_with_many, query.pooled, pool.matrix, pool.where)
        shortlist = max(FLAT_LIMIT, asked.k)
        rows = scores.best(similarities, pool.where, pool.ids, shortlist)[:shortlist]
        how, exact = f"the {len(rows)} with the largest cosine of pooled vectors were compared whole", False
    ids = [UUID(bytes=bytes(key)) for key in pool.ids[rows]]
    return _Found(rows, await scores.flat_similarities(request, session, query, ids), how, exact)


async def _by_index(
    request: Request, session: ReadOnlySession, query: Query, pool: Candidates, asked: SearchRequest
) -> _Found | None:
    """What the family's index gives, compared exactly; None when all candidates are to be compared instead."""
    family: indexes.Indexes = request.state.indexes
    snapshot, width = pool.snapshot, query.initialization.token_dim
    if snapshot is None:
        if asked.accuracy == "auto":
            return None
        raise Conflict(
            "an index is of a whole initialization, not of named candidates; ask with accuracy auto or exact"
        )
    small = pool.size * width < indexes.WORTH * family.above
    trusted = family.trusted(query.initialization.id, len(snapshot))
    if asked.accuracy == "auto" and (small or trusted is False):
        return None
    ready = await family.ready(session, query.initialization, len(snapshot))
    if asked.accuracy == "approximate" and not ready:
        raise Conflict(
            "there is no index for this initialization (yet): it is made some time after it is first asked for, in "
            f"{family.above // width} or more vectors; ask with accuracy auto or exact"
        )
    # An index is tried by searches of the usual thoroughness, for others say nothing of them.
    if not ready or (asked.accuracy == "auto" and trusted is None and asked.ef_search != EF_SEARCH):
        return None
    count = indexes.shortlist(width, asked.k)
    # Beyond the widest that is indexed as it is, the index ranks roughly: what is compared exactly decides.
    wanted = min(asked.k if width <= indexes.VECTOR_WIDTH else count // 2, pool.size)
    await release(session)  # the index is asked on a connection of its own
    for _ in range(3):
        ef_search = max(asked.ef_search, min(count, 1000))  # fewer are never found well
        ids = await family.nearest(query.initialization, query.pooled, count=count, ef_search=ef_search)
        if ids is None:
            return None
        rows = snapshot.rows_of(as_bytes(ids))
        rows = rows[pool.where[rows]]
        if len(rows) >= wanted:
            how = f"an HNSW index gave {len(ids)} (ef_search {ef_search}), which were compared exactly"
            return _compared(query, pool, rows, asked.k, how=how, exact=False)
        count *= 8
    return None  # the filter leaves so few that the index does not find them


@router.post("/similarity/matrix", responses={200: {"content": {"text/csv": {}}}}, response_model=MatrixAnswer)
async def matrix(
    request: Request,
    session: ReadOnlySession,
    _: Reader,
    asked: MatrixRequest,
    form: Annotated[
        Literal["json", "csv"], QueryParameter(alias="format", description="csv: similar ones side by side.")
    ] = "json",
) -> Any:
    """All similarities among the given vectors; `matrix[i][j]` compares references i and j."""
    rows = await _compared_versions(session, asked)
    check_same_initialization(rows, mixed=asked.allow_mixed_initializations)
    reference_pool = None
    if asked.metric == "cosine-flat":
        await release(session)
        values = await scores.flat_matrix(request, rows)
    else:
        vectors = pooled_of(rows)
        if asked.metric == "cosine-prompt":  # each soft prompt has a P_init of its own
            vectors = vectors + await scores.starts(request, [row.initialization for row in rows])
            measure = scores.Measure(metric="cosine")
        else:
            query = Query(label="the matrix", pooled=np.zeros(0, np.float32), initialization=rows[0].initialization)
            measure = await scores.measure(
                request, session, asked.metric, query, asked.reference_pool, [row.initialization for row in rows]
            )
            reference_pool = measure.reference_pool
        await release(session)
        values = await run_in_threadpool(measure.many_with_many, vectors, vectors)
    order = await run_in_threadpool(_clustered, values)
    if asked.normalize:
        spread = float(values.max() - values.min())
        values = (values - values.min()) / (spread or 1.0)
    references = [version_reference(row) for row in rows]
    if form == "csv":
        said = [asked.metric, "exact", *(["min-max normalized"] if asked.normalize else [])]
        said.append(" and ".join(dict.fromkeys(label(row.initialization) for row in rows)))
        if reference_pool is not None:
            said.append(f"less the mean of {reference_pool.size} ({reference_pool.rule})")
        ordered = [references[row] for row in order]
        return Response(_csv(", ".join(said), ordered, values[np.ix_(order, order)]), media_type="text/csv")
    others = {row.initialization_id: row.initialization for row in rows[1:]}
    others.pop(rows[0].initialization_id, None)
    return MatrixAnswer(
        references=references,
        matrix=values.tolist(),
        order=order,
        metric=asked.metric,
        normalized=asked.normalize,
        reference_pool=reference_pool,
        initialization=initialization_summary(rows[0].initialization),
        mixed_initializations=[initialization_summary(row) for row in others.values()],
    )


async def _compared_versions(session: ReadOnlySession, asked: MatrixRequest) -> list[VersionRow]:
    """The versions of a matrix, as they were named or by name; raises Invalid for none and for too many."""
    if asked.references is not None:
        rows = await registry.resolve_versions(session, asked.references, pooled=True)
    else:
        passing = registry.versions_to_compare().where(
            chosen(asked.versions, asked.filter), condition(asked.filter or Filter())
        )
        passing = passing.order_by(VectorRow.namespace, VectorRow.name, VersionRow.number).limit(asked.limit + 1)
        rows = [*await session.scalars(passing)]
    if not rows:
        raise Invalid("no vector passes the filter; see: tpv vector list")
    if len(rows) > asked.limit:
        other = f"; cosine takes {MATRIX_LIMIT}" if asked.limit < MATRIX_LIMIT else ""
        raise Invalid(f"a matrix of {asked.metric} compares at most {asked.limit} vectors, these are more{other}")
    return rows


def _clustered(similarities: NDArray[np.float32]) -> list[int]:
    """Rows in the order of the leaves of an average-linkage clustering; the most similar pair has the distance 0."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    if len(similarities) < 3:
        return list(range(len(similarities)))
    distances = np.triu(similarities.max() - similarities.astype(np.float64), 1)
    order: list[int] = leaves_list(linkage(squareform(distances + distances.T), "average")).tolist()
    return order


def _csv(said: str, references: list[str], values: NDArray[np.float32]) -> str:
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([said, *references])
    writer.writerows([reference, *row] for reference, row in zip(references, values.tolist(), strict=True))
    return text.getvalue()


@router.post("/groupings")
async def create_grouping(
    request: Request, session: ReadOnlySession, _: Reader, asked: GroupingRequest
) -> GroupingAnswer | GroupingsAnswer:
    """The group of source vectors for a target, with the decisions that led to it."""
    pools: dict[UUID, Candidates] = {}  # read once for all targets of an initialization
    items, listed = [], 0
    for target in [asked.target] if isinstance(asked.target, str) else asked.target:
        query = await read_query(request, session, target)
        if (pool := pools.get(query.initialization.id)) is None:
            mixed = asked.allow_mixed_initializations
            pool = await whole_pool(request, session, query, asked.candidates, mixed=mixed)
            pools[query.initialization.id] = pool
        items.append(await _group(session, asked, query, pool, listed))
        listed += len(items[-1].members) + len(items[-1].trace)
    return items[0] if isinstance(asked.target, str) else GroupingsAnswer(items=items)


async def _group(
    session: ReadOnlySession, asked: GroupingRequest, query: Query, whole: Candidates, before: int
) -> GroupingAnswer:
    """The group for one target; `before` members and decisions are in the same answer already."""
    pool = await leave_out(session, query, whole, allow_same_task=asked.allow_same_task)
    await release(session)
    similarities = await run_in_threadpool(
        scores.Measure(metric="dot").one_with_many, query.pooled, pool.matrix, pool.where
    )
    order = await _tie_order(session, asked, pool, similarities)
    limit = None if asked.trace == "all" else LISTED
    trade_off = 1.0 if asked.trade_off is None else asked.trade_off

    def group(strategy: grouping.Strategy, trace_size: int | None) -> grouping.Grouping:
        return grouping.group(
            query.pooled,
            pool.matrix,
            strategy=strategy,
            trade_off=trade_off if strategy == "exact" else None,
            max_size=asked.max_size,
            min_similarity=asked.min_similarity,
            similarities=similarities,
            where=pool.where,
            tie_order=order,
            trace_size=trace_size,
        )

    await release(session)
    try:
        result = await run_in_threadpool(group, asked.strategy, limit)
    except ValueError as error:
        raise Invalid(str(error)) from error
    if before + len(result.members) + len(result.trace) > ANSWER_LIMIT:
        raise Invalid(
            f"the answer would list more than {ANSWER_LIMIT} members and decisions; give max_size, narrow the "
            "candidates by a filter, ask for fewer targets, or not for the whole trace"
        )
    others = await run_in_threadpool(_compare, group) if asked.compare else []
    listed = {decision.index for decision in result.trace} | {*result.members}
    listed |= {index for _, other, _ in others if other for index in other.members[:LISTED]}
    shown = await named(session, [*pool.ids[sorted(listed)], *pool.excluded])
    reference = {index: shown[bytes(pool.ids[index])].reference for index in listed}
    return GroupingAnswer(
        target=query.label,
        members=[Member(reference=reference[i], similarity=float(similarities[i])) for i in result.members],
        target_similarity=result.target_similarity,
        knowledge_consistency=result.knowledge_consistency,
        objective=result.target_similarity + trade_off * result.knowledge_consistency,
        strategy=asked.strategy,
        trade_off=trade_off,
        max_size=asked.max_size,
        min_similarity=asked.min_similarity,
        trace=[
            TraceEntry(
                reference=reference[decision.index],
                rank=decision.rank,
                similarity=decision.similarity,
                consistency_before=decision.consistency_before,
                consistency_after=decision.consistency_after,
                taken=decision.taken,
                reason=decision.reason,
            )
            for decision in result.trace
        ],
        trace_total=result.trace_total,
        comparison=[
            StrategyResult(
                strategy=strategy,
                size=len(other.members) if other else 0,
                members=[reference[index] for index in other.members[:LISTED]] if other else [],
                target_similarity=other.target_similarity if other else None,
                knowledge_consistency=other.knowledge_consistency if other else None,
                objective=other.target_similarity + trade_off * other.knowledge_consistency if other else None,
                refused=refused,
            )
            for strategy, other, refused in others
        ]
        if asked.compare
        else None,
        pool=pool.echo("dot", query, shown),
    )


async def _tie_order(
    session: ReadOnlySession, asked: GroupingRequest, pool: Candidates, similarities: NDArray[np.float32]
) -> NDArray[np.int64] | None:
    """Places of candidates with equal similarities: as they were given, else in the order of their references.

    Where more than TIES candidates share their similarity with others, the oldest come first.
    """
    if asked.candidates.references is not None:
        return None
    rows = await run_in_threadpool(scores.tied, similarities, pool.where)
    if not len(rows):
        return None
    order = np.zeros(len(similarities), dtype=np.int64)
    if len(rows) > scores.TIES:
        order[by_age(pool.ids, rows)] = np.arange(len(rows))
        return order
    shown = await named(session, pool.ids[rows])
    references = [shown[bytes(key)].reference for key in pool.ids[rows]]
    order[rows[sorted(range(len(rows)), key=references.__getitem__)]] = np.arange(len(rows))
    return order


def _compare(group: Any) -> list[tuple[str, grouping.Grouping | None, str | None]]:
    """What every strategy gives, or why it refuses."""
    results: list[tuple[str, grouping.Grouping | None, str | None]] = []
    for strategy in grouping.STRATEGIES:
        try:
            results.append((strategy, group(strategy, 0), None))
        except ValueError as error:
            results.append((strategy, None, str(error)))
    return results
