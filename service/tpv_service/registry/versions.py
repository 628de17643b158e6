"""Versions of vectors: registered, shown, downloaded, deleted and restored."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Form, Path, Query, Request, UploadFile
from fastapi.responses import Response
from pydantic import Json
from sqlalchemy import func, update
from starlette.concurrency import run_in_threadpool

from tpv import files
from tpv.errors import InUse, InvalidTensor, NotFound
from tpv.schemas.base import Name, Page
from tpv.schemas.vectors import Version, VersionCreate
from tpv.vectors import Float32, as_prompt
from tpv_service.auth.tokens import Actor, Allowed
from tpv_service.content import content_response
from tpv_service.db import Session
from tpv_service.idempotency import IdempotentRequest
from tpv_service.pagination import PagingQuery, page
from tpv_service.registry import publish, queries
from tpv_service.registry.publish import StoredVector
from tpv_service.registry.tables import ChangeRow, VersionRow
from tpv_service.registry.views import version_view
from tpv_service.storage import BlobStore

router = APIRouter(tags=["versions"], prefix="/vectors/{namespace}/{name}")
Reader = Annotated[Actor, Depends(Allowed("read", "write", "worker"))]
Writer = Annotated[Actor, Depends(Allowed("write"))]


@router.post("/versions", status_code=201, response_model=Version)
async def register_version(
    request: Request,
    session: Session,
    actor: Writer,
    idempotency: IdempotentRequest,
    namespace: Name,
    name: Name,
    metadata: Annotated[Json[VersionCreate], Form()],
    file: UploadFile,
) -> Response:
    """Registers a vector: the file holds one tensor, `prompt` (P*) or `vector` (T). Equal content again is a 200."""
    initialization = await request.state.initializations.resolve(metadata.initialization)
    content, store = await file.read(), request.state.store
    stored = await run_in_threadpool(_store_upload, store, initialization.digest, content, metadata.fingerprint)
    if kept := await idempotency.begin(session, actor.name, metadata, stored.fingerprint):
        return kept
    row, created = await publish.publish_version(
        session,
        namespace=namespace,
        name=name,
        metadata=metadata,
        initialization=initialization,
        stored=stored,
        actor=actor.name,
    )
    return await idempotency.finish(session, version_view(row, created=created), 201 if created else 200)


def _store_upload(store: BlobStore, initialization: str, content: bytes, declared: str | None) -> StoredVector:
    tensors = files.load(content)
    if set(tensors) not in ({"prompt"}, {"vector"}):
        raise InvalidTensor(
            f"the file holds one tensor, `prompt` (P*) or `vector` (T); this one has {sorted(tensors) or 'none'}"
        )
    given: dict[str, Float32] = {name: as_prompt(tensor, name) for name, tensor in tensors.items()}
    return publish.store_vector(store, start=publish.load_start(store, initialization), declared=declared, **given)


@router.get("/versions")
async def list_versions(
    session: Session, _: Reader, paging: PagingQuery, namespace: Name, name: Name, deleted: bool = False
) -> Page[Version]:
    """A vector's versions, newest first; deleted ones on request."""
    vector = await queries.vector_by_name(session, namespace, name, deleted=deleted)
    statement = queries.full_version().where(VersionRow.vector_id == vector.id)
    if not deleted:
        statement = statement.where(VersionRow.deleted_at.is_(None))
    return await page(
        session, statement, [VersionRow.number], lambda row: [row.number], version_view, paging, descending=True
    )


@router.get("/versions/{v}")
async def get_version(session: Session, _: Reader, namespace: Name, name: Name, v: str) -> Version:
    """One version: `{v}` is a number, `@alias` or `newest`. A deleted one is shown by its number."""
    return version_view(await queries.version_at(session, namespace, name, v, deleted=True))


@router.get("/versions/{v}/content", response_class=Response)
async def get_version_content(request: Request, _: Reader, namespace: Name, name: Name, v: str) -> Response:
    """T as safetensors, tensor `vector`, (num_virtual_tokens, token_dim) float32."""
    async with request.state.readers() as session:
        row = await queries.files_at(session, namespace, name, v)
    return await content_response(
        request, row.digest, media_type="application/octet-stream", filename=f"{name}-{row.number}.safetensors"
    )


@router.get("/versions/{v}/state", response_class=Response)
async def get_version_state(request: Request, _: Reader, namespace: Name, name: Name, v: str) -> Response:
    """The method's own tensors as safetensors: of a `dtvg` transfer T_t and the scaling terms."""
    async with request.state.readers() as session:
        row = await queries.files_at(session, namespace, name, v)
    if row.state is None:
        raise NotFound(f"{namespace}/{name}:{row.number} keeps no tensors of its method")
    return await content_response(
        request,
        row.state,
        media_type="application/octet-stream",
        filename=f"{name}-{row.number}-state.safetensors",
    )


@router.delete("/versions/{v}")
async def delete_version(
    session: Session,
    actor: Writer,
    namespace: Name,
    name: Name,
    v: Annotated[str, Path(pattern=r"^[0-9]+$", description="A number: aliases move, and this is repeated safely.")],
    force: Annotated[bool, Query(description="Also when an alias or a descendant points there.")] = False,
) -> Version:
    """Deletes a version softly; `restore` brings it back, and its number is never used again."""
    await queries.vector_by_name(session, namespace, name, lock=True)
    row = await queries.version_at(session, namespace, name, v, deleted=True)
    if row.deleted_at:
        return version_view(row)
    if not force:
        await refuse_if_used(session, [row])
    await session.execute(update(VersionRow).where(VersionRow.id == row.id).values(deleted_at=func.now()))
    session.add(_change(row, "delete", actor, {"force": force}))
    return version_view(await queries.reload_version(session, row))


@router.post("/versions/{v}/restore")
async def restore_version(session: Session, actor: Writer, namespace: Name, name: Name, v: str) -> Version:
    """Brings a deleted version back."""
    await queries.vector_by_name(session, namespace, name, lock=True)
    row = await queries.version_at(session, namespace, name, v, deleted=True)
    await session.execute(update(VersionRow).where(VersionRow.id == row.id).values(deleted_at=None))
    session.add(_change(row, "restore", actor, {}))
    return version_view(await queries.reload_version(session, row))


def _change(row: VersionRow, action: str, actor: Actor, data: dict[str, Any]) -> ChangeRow:
    return ChangeRow(vector_id=row.vector_id, version=row.number, action=action, data=data, actor=actor.name)


async def refuse_if_used(session: Session, rows: list[VersionRow]) -> None:
    """Raises InUse while an alias, a live job or a not deleted descendant points to one of the versions."""
    uses = [f"alias @{alias.alias}" for row in rows for alias in row.aliases]
    uses += [f"descendant {reference}" for reference in await queries.live_descendants(session, [r.id for r in rows])]
    uses += [f"job {job}" for job in await queries.live_jobs_using(session, [r.id for r in rows])]
    if uses:
        raise InUse(
            f"still in use by {', '.join(dict.fromkeys(uses))}; remove these first, or delete with force", uses=uses
        )
