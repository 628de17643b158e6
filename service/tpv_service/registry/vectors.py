"""Named vectors: listed, shown, described, deleted and restored as a whole."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query
from sqlalchemy import func, select
from sqlalchemy.orm import selectinload

from tpv.errors import InUse, Invalid
from tpv.schemas.base import Name, Page
from tpv.schemas.vectors import Vector, VectorUpdate
from tpv_service.auth.tokens import Actor, Allowed
from tpv_service.db import Session
from tpv_service.pagination import PagingQuery, page
from tpv_service.registry import queries
from tpv_service.registry.tables import BaseModelRow, ChangeRow, InitializationRow, VectorRow, VersionRow
from tpv_service.registry.versions import refuse_if_used
from tpv_service.registry.views import vector_view

router = APIRouter(tags=["vectors"], prefix="/vectors")
Reader = Annotated[Actor, Depends(Allowed("read", "write", "worker"))]
Writer = Annotated[Actor, Depends(Allowed("write"))]


@router.get("")
async def list_vectors(
    session: Session,
    _: Reader,
    paging: PagingQuery,
    namespace: Name | None = None,
    task: str | None = None,
    task_type: str | None = None,
    base_model: str | None = None,
    tag: Annotated[list[str] | None, Query(description="key:value; several must all be there")] = None,
    deleted: bool = False,
) -> Page[Vector]:
    """Vectors by name; deleted ones instead on request."""
    statement = select(VectorRow).options(selectinload(VectorRow.aliases))
    statement = statement.where(VectorRow.deleted_at.is_not(None) if deleted else VectorRow.deleted_at.is_(None))
    if namespace:
        statement = statement.where(VectorRow.namespace == namespace)
    if task:
        statement = statement.where(VectorRow.tasks.contains([task]))
    if task_type:
        statement = statement.where(VectorRow.task_type == task_type)
    for key, value in map(_tag, tag or ()):
        statement = statement.where(VectorRow.tags.contains({key: value}))
    if base_model:
        statement = statement.where(
            VectorRow.id.in_(
                select(VersionRow.vector_id)
                .join(VersionRow.initialization)
                .join(InitializationRow.base_model)
                .where(BaseModelRow.name == base_model)
            )
        )
    order = [VectorRow.namespace, VectorRow.name]
    rows = await page(session, statement, order, lambda row: [row.namespace, row.name], lambda row: row, paging)
    return Page(items=await _views(session, rows.items), next_cursor=rows.next_cursor)


def _tag(text: str) -> tuple[str, str]:
    key, colon, value = text.partition(":")
    if not (key and colon):
        raise Invalid(f"tag={text!r}: write key:value")
    return key, value


async def _views(session: Session, rows: list[VectorRow]) -> list[Vector]:
    ids = [row.id for row in rows]
    newest, models = await queries.newest_version_numbers(session, ids), await queries.base_models_of(session, ids)
    return [vector_view(row, newest_version=newest.get(row.id), base_models=models.get(row.id, [])) for row in rows]


async def _view(session: Session, row: VectorRow) -> Vector:
    return (await _views(session, [row]))[0]


@router.get("/{namespace}/{name}")
async def get_vector(session: Session, _: Reader, namespace: Name, name: Name) -> Vector:
    """One vector, deleted or not, with its aliases."""
    return await _view(session, await queries.vector_by_name(session, namespace, name, deleted=True))


@router.patch("/{namespace}/{name}")
async def update_vector(session: Session, actor: Writer, namespace: Name, name: Name, changes: VectorUpdate) -> Vector:
    """Changes description, task type or tags; what is not given stays."""
    row = await queries.vector_by_name(session, namespace, name, lock=True)
    for member in changes.model_fields_set:
        setattr(row, member, getattr(changes, member) if member != "tags" else changes.tags or {})
    change = {"action": "update", "data": changes.model_dump(exclude_unset=True)}
    session.add(ChangeRow(vector_id=row.id, actor=actor.name, **change))
    await session.flush()
    return await _view(session, row)


@router.delete("/{namespace}/{name}")
async def delete_vector(
    session: Session,
    actor: Writer,
    namespace: Name,
    name: Name,
    force: Annotated[bool, Query(description="Also when an alias or a descendant points there.")] = False,
) -> Vector:
    """Deletes a vector with all its versions, softly; `restore` brings it back as it was."""
    row = await queries.vector_by_name(session, namespace, name, lock=True)
    if not force:
        versions = await session.scalars(queries.full_version().where(VersionRow.vector_id == row.id))
        await refuse_if_used(session, list(versions))
        if jobs := await queries.live_jobs_making(session, namespace, name):
            raise InUse(f"job {jobs[0]} will register under this name; cancel it first: tpv job cancel {jobs[0]}")
    row.deleted_at = func.now()  # an SQL expression until the flush
    session.add(ChangeRow(vector_id=row.id, action="delete", data={"force": force}, actor=actor.name))
    await session.flush()
    return await _view(session, await queries.vector_by_name(session, namespace, name, deleted=True))


@router.post("/{namespace}/{name}/restore")
async def restore_vector(session: Session, actor: Writer, namespace: Name, name: Name) -> Vector:
    """Brings a deleted vector back."""
    row = await queries.vector_by_name(session, namespace, name, lock=True, deleted=True)
    row.deleted_at = None
    session.add(ChangeRow(vector_id=row.id, action="restore", data={}, actor=actor.name))
    await session.flush()
    return await _view(session, row)
