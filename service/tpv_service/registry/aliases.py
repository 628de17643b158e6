"""Aliases: names that point to one version and may move; every move is kept."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query
from sqlalchemy import select

from tpv.errors import AliasMoved, NotFound
from tpv.references import check_alias
from tpv.schemas.base import Name
from tpv.schemas.vectors import Alias, AliasChange, AliasSet
from tpv_service.auth.tokens import Actor, Allowed
from tpv_service.db import Session
from tpv_service.registry import queries
from tpv_service.registry.tables import AliasChangeRow, AliasRow, VectorRow

router = APIRouter(tags=["aliases"], prefix="/vectors/{namespace}/{name}/aliases/{alias}")
Reader = Annotated[Actor, Depends(Allowed("read", "write", "worker"))]
Writer = Annotated[Actor, Depends(Allowed("write"))]


@router.put("")
async def set_alias(
    session: Session, actor: Writer, namespace: Name, name: Name, alias: str, wanted: AliasSet
) -> Alias:
    """Points an alias to a version; with `expected_version`, only if it points there now (409 otherwise)."""
    check_alias(alias)
    vector = await queries.vector_by_name(session, namespace, name, lock=True)
    row = _find(vector, alias)
    if row and row.version == wanted.version:
        return Alias(alias=alias, version=row.version)  # also when our own earlier request has moved it
    _check_expected(alias, row, wanted.expected_version)
    version = await queries.version_at(session, namespace, name, str(wanted.version))
    before = row.version if row else None
    if row:
        row.version = version.number
    else:
        session.add(AliasRow(vector_id=vector.id, alias=alias, version=version.number))
    session.add(_change(vector, alias, before, version.number, actor, wanted.reason))
    await session.flush()
    return Alias(alias=alias, version=version.number)


@router.delete("", status_code=204)
async def delete_alias(
    session: Session,
    actor: Writer,
    namespace: Name,
    name: Name,
    alias: str,
    expected_version: Annotated[int | None, Query(ge=1)] = None,
    reason: Annotated[str | None, Query(max_length=1000)] = None,
) -> None:
    """Removes an alias; its history stays."""
    vector = await queries.vector_by_name(session, namespace, name, lock=True)
    row = _find(vector, check_alias(alias))
    _check_expected(alias, row, expected_version)
    if row is None:
        raise NotFound(f"{namespace}/{name} has no alias @{alias}; see: tpv vector show {namespace}/{name}")
    session.add(_change(vector, alias, row.version, None, actor, reason))
    await session.delete(row)
    await session.flush()


@router.get("/history")
async def get_alias_history(session: Session, _: Reader, namespace: Name, name: Name, alias: str) -> list[AliasChange]:
    """Every move of an alias, newest first: who, when, from, to, why."""
    vector = await queries.vector_by_name(session, namespace, name, deleted=True)
    rows = await session.scalars(
        select(AliasChangeRow)
        .where(AliasChangeRow.vector_id == vector.id, AliasChangeRow.alias == check_alias(alias))
        .order_by(AliasChangeRow.id.desc())
    )
    return [AliasChange.model_validate(row) for row in rows]


def _find(vector: VectorRow, alias: str) -> AliasRow | None:
    return next((row for row in vector.aliases if row.alias == alias), None)


def _check_expected(alias: str, row: AliasRow | None, expected: int | None) -> None:
    if expected is not None and (row is None or row.version != expected):
        found = f"points to version {row.version}" if row else "is not there"
        raise AliasMoved(
            f"@{alias} {found}, not to version {expected}; look again before you move it",
            version=row.version if row else None,
        )


def _change(
    vector: VectorRow, alias: str, before: int | None, after: int | None, actor: Actor, reason: str | None
) -> AliasChangeRow:
    return AliasChangeRow(
        vector_id=vector.id, alias=alias, from_version=before, to_version=after, actor=actor.name, reason=reason
    )
