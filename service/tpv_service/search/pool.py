"""Which versions a query looks at: chosen in SQL, echoed in every answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from uuid import UUID

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Select, select
from sqlalchemy.dialects.postgresql import distinct_on
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import undefer

from tpv.errors import IncompatibleVectors
from tpv.schemas.similarity import Pool, PoolEcho
from tpv_service.registry import queries
from tpv_service.registry.tables import InitializationRow, ParentRow, VectorRow, VersionRow
from tpv_service.registry.views import initialization_summary, version_reference

NEWEST_RULE = "the newest not deleted version of each vector of the initialization that passes the filter"
GIVEN_RULE = "the references given"


@dataclass(frozen=True, kw_only=True)
class ChosenPool:
    """The versions that are left, as a statement, and why others are not among them."""

    rule: str
    versions: Select[UUID]  #: ids
    order: list[UUID] | None  #: as the references were given
    excluded: dict[str, str] = field(default_factory=dict)

    def echo(self, metric: str, initialization: InitializationRow, size: int) -> PoolEcho:
        return PoolEcho(
            rule=self.rule,
            metric=metric,
            initialization=initialization_summary(initialization),
            size=size,
            excluded=self.excluded,
            exact=True,
        )


async def choose(session: AsyncSession, target: VersionRow, pool: Pool, *, allow_same_task: bool) -> ChosenPool:
    """The candidates for a target: never itself, nor vectors of its own task or made from it, unless allowed."""
    order = None
    if pool.references:
        rows = [await queries.resolve_version(session, reference) for reference in pool.references]
        check_same_initialization([target, *rows])
        order = list(dict.fromkeys(row.id for row in rows))
        versions = select(VersionRow.id).where(VersionRow.id.in_(order))
    else:
        newest = (
            select(VersionRow.id)
            .join(VersionRow.vector)
            .ext(distinct_on(VersionRow.vector_id))
            .where(
                VersionRow.initialization_id == target.initialization_id,
                VersionRow.deleted_at.is_(None),
                VectorRow.deleted_at.is_(None),
            )
            .order_by(VersionRow.vector_id, VersionRow.number.desc())
        )
        versions = select(VersionRow.id).where(VersionRow.id.in_(newest)).join(VersionRow.vector)
    if pool.task:
        versions = versions.where(VersionRow.vector.has(VectorRow.tasks.contains([pool.task])))
    if pool.task_type:
        versions = versions.where(VersionRow.vector.has(VectorRow.task_type == pool.task_type))
    if pool.namespace:
        versions = versions.where(VersionRow.vector.has(VectorRow.namespace == pool.namespace))
    excluded = await _excluded(session, target, versions, allow_same_task=allow_same_task)
    return ChosenPool(
        rule=GIVEN_RULE if pool.references else NEWEST_RULE,
        versions=versions.where(VersionRow.id.not_in(excluded)) if excluded else versions,
        order=order,
        excluded=dict(excluded.values()),
    )


async def _excluded(
    session: AsyncSession, target: VersionRow, versions: Select[UUID], *, allow_same_task: bool
) -> dict[UUID, tuple[str, str]]:
    """id -> (reference, reason) of the versions that must not help this target."""
    descendants = await _descendants(session, target) if not allow_same_task else set()
    doubtful = VersionRow.vector_id == target.vector_id
    if not allow_same_task:
        doubtful |= VersionRow.vector.has(VectorRow.tasks.overlap(target.vector.tasks)) | VersionRow.id.in_(descendants)
    rows = await session.scalars(queries.bare_version().where(VersionRow.id.in_(versions), doubtful))
    found = {}
    for row in rows:
        if row.vector_id == target.vector_id:
            if row.id != target.id and allow_same_task:
                continue
            reason = "the target itself"
        else:
            reason = "made from the target" if row.id in descendants else "the target's own task"
        found[row.id] = (version_reference(row), reason)
    return found


async def _descendants(session: AsyncSession, target: VersionRow) -> set[UUID]:
    """Every version that was made, over any number of steps, from a version of the target's name."""
    made = (
        select(ParentRow.version_id)
        .join(VersionRow, VersionRow.id == ParentRow.parent_id)
        .where(VersionRow.vector_id == target.vector_id)
        .cte("made", recursive=True)
    )
    made = made.union(select(ParentRow.version_id).join(made, ParentRow.parent_id == made.c.version_id))
    return set(await session.scalars(select(made.c.version_id)))


def check_same_initialization(rows: Sequence[VersionRow]) -> None:
    """Raises IncompatibleVectors naming the first two that differ, field by field."""
    first = rows[0]
    for row in rows[1:]:
        if row.initialization_id != first.initialization_id:
            one, other = initialization_summary(first.initialization), initialization_summary(row.initialization)
            differences = {
                name: [getattr(one, name), getattr(other, name)]
                for name in ("fingerprint", "base_model", "num_virtual_tokens", "token_dim")
                if getattr(one, name) != getattr(other, name)
            }
            raise IncompatibleVectors(
                f"{version_reference(first)} and {version_reference(row)} have different initializations "
                f"({one.name or one.id}, {other.name or other.id}): they differ in {', '.join(differences)}",
                differences=differences,
            )


async def load(session: AsyncSession, pool: ChosenPool) -> tuple[list[VersionRow], NDArray[np.float32]]:
    """The pool's versions and their pooled vectors (n, d), in the given order, else by name."""
    statement = queries.bare_version().where(VersionRow.id.in_(pool.versions)).options(undefer(VersionRow.pooled))
    rows = list(await session.scalars(statement.order_by(VectorRow.namespace, VectorRow.name, VersionRow.number)))
    if pool.order:
        place = {version: i for i, version in enumerate(pool.order)}
        rows.sort(key=lambda row: place[row.id])
    return rows, pooled_matrix(rows)


def pooled_matrix(rows: Sequence[VersionRow]) -> NDArray[np.float32]:
    """Pooled vectors of loaded versions, (n, d)."""
    if not rows:
        return np.zeros((0, 0), dtype=np.float32)
    return np.stack([np.asarray(row.pooled, dtype=np.float32) for row in rows])
