"""Which vectors are alike, and which of them help a target together."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends
from sqlalchemy import func, select
from sqlalchemy.orm import contains_eager, undefer

from tpv.grouping import group
from tpv.schemas.similarity import (
    GroupingAnswer,
    GroupingRequest,
    Hit,
    MatrixAnswer,
    MatrixRequest,
    Member,
    SearchAnswer,
    SearchRequest,
    TraceEntry,
)
from tpv.similarity import dot
from tpv_service.auth.tokens import Actor, Allowed
from tpv_service.db import Session
from tpv_service.registry import queries
from tpv_service.registry.tables import VectorRow, VersionRow
from tpv_service.registry.views import initialization_summary, version_reference
from tpv_service.search import pool as pools

router = APIRouter(tags=["similarity"])
Reader = Annotated[Actor, Depends(Allowed("read", "write", "worker"))]


@router.post("/similarity/search")
async def search(session: Session, _: Reader, asked: SearchRequest) -> SearchAnswer:
    """The k vectors most similar to one, exactly, by the product of pooled vectors (Eq. 2)."""
    target = await queries.resolve_version(session, asked.query)
    pool = await pools.choose(session, target, asked.candidates, allow_same_task=asked.allow_same_task)
    vector = select(VersionRow.pooled).where(VersionRow.id == target.id).scalar_subquery()
    distance = VersionRow.pooled.max_inner_product(vector)  # pgvector's <#> is the negative product
    size = await session.scalar(select(func.count()).select_from(pool.versions.subquery()))
    rows = await session.execute(
        select(VersionRow, (-distance).label("similarity"))
        .join(VersionRow.vector)
        .options(contains_eager(VersionRow.vector))
        .where(VersionRow.id.in_(pool.versions))
        .order_by(distance, VectorRow.namespace, VectorRow.name, VersionRow.number)
        .limit(asked.k)
    )
    return SearchAnswer(
        query=version_reference(target),
        hits=[
            Hit(
                reference=version_reference(row),
                similarity=similarity,
                tasks=row.vector.tasks,
                task_type=row.vector.task_type,
            )
            for row, similarity in rows
        ],
        pool=pool.echo(asked.metric, target.initialization, size or 0),
    )


@router.post("/similarity/matrix")
async def matrix(session: Session, _: Reader, asked: MatrixRequest) -> MatrixAnswer:
    """All similarities among the given vectors; `matrix[i][j]` compares references i and j."""
    rows = [await queries.resolve_version(session, reference) for reference in asked.references]
    pools.check_same_initialization(rows)
    loaded = await session.scalars(
        queries.bare_version().where(VersionRow.id.in_([row.id for row in rows])).options(undefer(VersionRow.pooled))
    )
    by_id = {row.id: row for row in loaded}
    vectors = pools.pooled_matrix([by_id[row.id] for row in rows])
    return MatrixAnswer(
        references=[version_reference(row) for row in rows],
        matrix=dot(vectors, vectors).tolist(),
        metric=asked.metric,
        initialization=initialization_summary(rows[0].initialization),
    )


@router.post("/groupings")
async def create_grouping(session: Session, _: Reader, asked: GroupingRequest) -> GroupingAnswer:
    """The group of source vectors for a target, with every decision that led to it (Algorithm 2)."""
    target = await queries.resolve_version(session, asked.target)
    pool = await pools.choose(session, target, asked.candidates, allow_same_task=asked.allow_same_task)
    rows, vectors = await pools.load(session, pool)
    (pooled,) = pools.pooled_matrix(
        list(
            await session.scalars(
                queries.bare_version().where(VersionRow.id == target.id).options(undefer(VersionRow.pooled))
            )
        )
    )
    result = group(
        pooled,
        vectors.reshape(-1, len(pooled)),
        strategy=asked.strategy,
        max_size=asked.max_size,
        min_similarity=asked.min_similarity,
    )
    names = [version_reference(row) for row in rows]
    similarities = {decision.index: decision.similarity for decision in result.trace}
    return GroupingAnswer(
        target=version_reference(target),
        members=[Member(reference=names[i], similarity=similarities[i]) for i in result.members],
        target_similarity=result.target_similarity,
        knowledge_consistency=result.knowledge_consistency,
        objective=result.objective,
        strategy=asked.strategy,
        trace=[
            TraceEntry(
                reference=names[decision.index],
                rank=decision.rank,
                similarity=decision.similarity,
                consistency_before=decision.consistency_before,
                consistency_after=decision.consistency_after,
                taken=decision.taken,
                reason=decision.reason,
            )
            for decision in result.trace
        ],
        pool=pool.echo("dot", target.initialization, len(rows)),
    )
