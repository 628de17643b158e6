"""Initializations and base models: the P_init that a family of vectors shares."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Form, Request, UploadFile
from fastapi.responses import Response
from pydantic import Json
from sqlalchemy import select
from starlette.concurrency import run_in_threadpool

from tpv import files
from tpv.errors import InvalidTensor
from tpv.schemas.base import Name, Page
from tpv.schemas.initializations import BaseModel, Initialization, InitializationCreate
from tpv.vectors import Float32, as_prompt
from tpv_service.auth.tokens import Actor, Allowed
from tpv_service.content import content_response
from tpv_service.db import Session
from tpv_service.idempotency import IdempotentRequest
from tpv_service.pagination import PagingQuery, page
from tpv_service.registry import publish, queries
from tpv_service.registry.tables import BaseModelRow, InitializationRow
from tpv_service.registry.views import initialization_view
from tpv_service.storage import BlobStore

router = APIRouter(tags=["initializations"])
Reader = Annotated[Actor, Depends(Allowed("read", "write", "worker"))]
Writer = Annotated[Actor, Depends(Allowed("write"))]


@router.post("/initializations", status_code=201, response_model=Initialization)
async def upload_initialization(
    request: Request,
    session: Session,
    actor: Writer,
    idempotency: IdempotentRequest,
    metadata: Annotated[Json[InitializationCreate], Form()],
    file: UploadFile,
) -> Response:
    """Registers an imported initialization; the file holds one tensor `prompt`, (num_virtual_tokens, token_dim)."""
    store: BlobStore = request.state.store
    tensor, stored = await run_in_threadpool(_store_prompt, store, await file.read(), metadata.fingerprint)
    if kept := await idempotency.begin(session, actor.name, metadata, stored):
        return kept
    row, created = await publish.publish_initialization(
        session,
        namespace=metadata.namespace,
        name=metadata.name,
        base_model=metadata.base_model,
        facts=metadata.base_model_facts,
        strategy=metadata.strategy,
        parameters={},
        tensor=tensor,
        digest=stored[0],
        size=stored[1],
        actor=actor.name,
    )
    return await idempotency.finish(session, initialization_view(row, created=created), 201 if created else 200)


def _store_prompt(store: BlobStore, content: bytes, declared: str | None) -> tuple[Float32, tuple[str, int]]:
    """The checked tensor `prompt` of an uploaded file, and digest and size of its canonical form in the store."""
    tensors = files.load(content)
    if set(tensors) != {"prompt"}:
        raise InvalidTensor(
            f"an initialization's file holds one tensor `prompt`; this one has {sorted(tensors) or 'none'}"
        )
    tensor = as_prompt(tensors["prompt"], "initialization")
    if declared:
        publish.check_declared(declared, files.fingerprint(tensor))
    canonical = files.dump({"prompt": tensor})
    return tensor, (store.put(canonical), len(canonical))


@router.get("/initializations")
async def list_initializations(
    session: Session, _: Reader, paging: PagingQuery, namespace: Name | None = None, base_model: str | None = None
) -> Page[Initialization]:
    """Initializations, oldest first."""
    statement = queries.full_initialization().join(InitializationRow.base_model)
    if namespace:
        statement = statement.where(InitializationRow.namespace == namespace)
    if base_model:
        statement = statement.where(BaseModelRow.name == base_model)
    return await page(session, statement, [InitializationRow.id], lambda row: [row.id], initialization_view, paging)


@router.get("/initializations/{namespace}/{reference}")
async def get_initialization(session: Session, _: Reader, namespace: Name, reference: str) -> Initialization:
    """One initialization, by name, id or fingerprint."""
    return initialization_view(await queries.resolve_initialization(session, reference, namespace))


@router.get("/initializations/{namespace}/{reference}/content", response_class=Response)
async def get_initialization_content(request: Request, _: Reader, namespace: Name, reference: str) -> Response:
    """P_init as safetensors, tensor `prompt`."""
    async with request.state.readers() as session:
        row = await queries.resolve_initialization(session, reference, namespace)
    return await content_response(
        request,
        row.digest,
        media_type="application/octet-stream",
        filename=f"{row.name or row.id}.safetensors",
    )


@router.get("/base-models")
async def list_base_models(session: Session, _: Reader, paging: PagingQuery) -> Page[BaseModel]:
    """Every base model that something belongs to."""
    return await page(
        session, select(BaseModelRow), [BaseModelRow.id], lambda row: [row.id], BaseModel.model_validate, paging
    )
