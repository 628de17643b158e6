"""The lineage of a version: all that it was made from, and all that was made from it."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends
from sqlalchemy import Select, literal, select
from sqlalchemy.orm import InstrumentedAttribute, contains_eager

from tpv.schemas.base import Name
from tpv.schemas.lineage import MAX_EDGES, MAX_NODES, Lineage, LineageEdge, LineageNode
from tpv_service.auth.tokens import Actor, Allowed
from tpv_service.db import Session
from tpv_service.registry import queries
from tpv_service.registry.tables import ParentRow, VersionRow
from tpv_service.registry.views import version_reference

router = APIRouter(tags=["versions"])
Reader = Annotated[Actor, Depends(Allowed("read", "write", "worker"))]


@router.get("/vectors/{namespace}/{name}/versions/{v}/lineage")
async def get_lineage(session: Session, _: Reader, namespace: Name, name: Name, v: str) -> Lineage:
    """Ancestors and descendants, deleted ones too, with every edge between them; at most 1000 in each direction."""
    version = await queries.version_at(session, namespace, name, v, deleted=True)
    directions = [(ParentRow.version_id, ParentRow.parent_id), (ParentRow.parent_id, ParentRow.version_id)]
    found = [list(await session.scalars(_reached(version.id, here, there))) for here, there in directions]
    ids = {version_id for reached in found for version_id in reached[:MAX_NODES]}
    nodes = (
        await session.scalars(
            select(VersionRow)
            .join(VersionRow.vector)
            .options(contains_eager(VersionRow.vector))
            .where(VersionRow.id.in_(ids))
            .order_by(VersionRow.id)  # UUIDs v7: a parent is older than its children
        )
    ).all()
    references = {row.id: version_reference(row) for row in nodes}
    edges = (
        await session.scalars(
            select(ParentRow)
            .where(ParentRow.version_id.in_(ids), ParentRow.parent_id.in_(ids))
            .order_by(ParentRow.version_id, ParentRow.position)
            .limit(MAX_EDGES + 1)
        )
    ).all()
    return Lineage(
        reference=version_reference(version),
        nodes=[
            LineageNode(
                reference=references[row.id],
                fingerprint=row.fingerprint,
                method=row.method,
                job=row.job_id,
                deleted=row.deleted_at is not None or row.vector.deleted_at is not None,
            )
            for row in nodes
        ],
        edges=[
            LineageEdge(
                parent=references[row.parent_id], child=references[row.version_id], role=row.role, weight=row.weight
            )
            for row in edges[:MAX_EDGES]
        ],
        truncated=any(len(reached) > MAX_NODES for reached in found) or len(edges) > MAX_EDGES,
    )


def _reached(start: UUID, here: InstrumentedAttribute[UUID], there: InstrumentedAttribute[UUID]) -> Select[UUID]:
    """The version itself and all that edges lead to, each once, nearest first; one more than the limit tells of more.

    Postgres computes a recursive query only as far as its rows are fetched, so the limit bounds the work as well.
    """
    reached = select(literal(start).label("id")).cte("reached", recursive=True)
    reached = reached.union(select(there).join(reached, here == reached.c.id))
    return select(reached.c.id).limit(MAX_NODES + 1)
