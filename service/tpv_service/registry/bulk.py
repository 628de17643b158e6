"""Many vectors in one request: registered all or none, and downloaded as one file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Annotated

from fastapi import APIRouter, Depends, Form, Request, UploadFile
from fastapi.responses import Response, StreamingResponse
from pydantic import Json
from starlette.concurrency import run_in_threadpool

from tpv import files
from tpv.errors import InvalidTensor
from tpv.schemas.bulk import BulkContentRequest, BulkCreate, BulkCreated, BulkItem, BulkRow
from tpv_service.auth.tokens import Actor, Allowed
from tpv_service.db import ReadOnlySession, Session
from tpv_service.idempotency import IdempotentRequest
from tpv_service.registry import publish, queries
from tpv_service.registry.compatibility import are_mixed
from tpv_service.registry.publish import StoredVector
from tpv_service.registry.views import version_reference
from tpv_service.storage import BlobStore, side_by_side

router = APIRouter(tags=["bulk"], prefix="/vectors/bulk")
Reader = Annotated[Actor, Depends(Allowed("read", "write", "worker"))]
Writer = Annotated[Actor, Depends(Allowed("write"))]

BLOCK = 1 << 20  #: bytes of vectors that are read, verified and sent at a time


@router.post("", status_code=201, response_model=BulkCreated)
async def register_versions(
    request: Request,
    session: Session,
    actor: Writer,
    idempotency: IdempotentRequest,
    metadata: Annotated[Json[BulkCreate], Form()],
    file: UploadFile,
) -> Response:
    """Registers many vectors of one initialization, all or none: item i of `metadata` is row i of the file's tensor.

    The tensor is `prompts` (P*) or `vectors` (T), (n, r, d). Each item is registered as it would be alone, one after
    the other; an error tells its `index` and `name`. When nothing is new, the answer is a 200.
    """
    initialization = await request.state.initializations.resolve(metadata.initialization)
    items, content = metadata.complete_items(), await file.read()
    stored = await run_in_threadpool(_store_upload, request.state.store, initialization.digest, content, items)
    asked = files.digest(metadata.model_dump_json().encode())
    if kept := await idempotency.begin(session, actor.name, asked, [blob.fingerprint for blob in stored]):
        return kept
    made = await publish.publish_versions(
        session, items=items, initialization=initialization, stored=stored, actor=actor.name
    )
    created = any(item.created for item in made)
    return await idempotency.finish(session, BulkCreated(items=made), 201 if created else 200)


def _store_upload(
    store: BlobStore, initialization: str, content: bytes, items: Sequence[BulkItem]
) -> list[StoredVector]:
    names = [item.name for item in items]
    try:
        tensors = files.load(content)
    except InvalidTensor as error:
        first = error.extra.get("first")  # the place of the first value that is not finite
        if not first or first[0] >= len(names):
            raise
        with publish.of_item(first[0], names):
            raise
    if set(tensors) not in ({"prompts"}, {"vectors"}):
        raise InvalidTensor(
            f"the file holds one tensor, `prompts` (P*) or `vectors` (T); this one has {sorted(tensors) or 'none'}"
        )
    ((name, tensor),) = tensors.items()
    if tensor.ndim != 3 or len(tensor) != len(items):
        raise InvalidTensor(
            f"{name} has the shape {list(tensor.shape)}; for {len(items)} items it is ({len(items)}, "
            "num_virtual_tokens, token_dim)"
        )
    start = publish.load_start(store, initialization)
    declared = [item.fingerprint for item in items]
    return publish.store_vectors(store, start=start, declared=declared, names=names, **{name: tensor})


@router.post("/content", response_class=Response)
async def get_versions_content(
    request: Request, session: ReadOnlySession, _: Reader, asked: BulkContentRequest
) -> StreamingResponse:
    """Many T as one safetensors file: the tensor `vectors`, (n, num_virtual_tokens, token_dim) float32.

    Its metadata has under `versions` a JSON list that tells for each row reference, fingerprint and initialization. A
    damaged vector that is met on the way breaks the download off.
    """
    rows = await queries.resolve_versions(session, asked.references)
    first = rows[0].initialization
    for row in rows:
        pair = (version_reference(rows[0]), first), (version_reference(row), row.initialization)
        are_mixed(*pair, allowed=asked.allow_mixed_initializations)
    versions = [
        BulkRow(
            reference=version_reference(row),
            fingerprint=row.fingerprint,
            initialization=row.initialization.fingerprint,
        ).model_dump()
        for row in rows
    ]
    shape = first.num_virtual_tokens, first.token_dim
    header = files.header({"vectors": (len(rows), *shape)}, {"versions": json.dumps(versions)})
    size = 4 * shape[0] * shape[1]
    return StreamingResponse(
        _content(request.state.store, header, [row.digest for row in rows], size),
        headers={"Content-Length": str(len(header) + len(rows) * size)},
        media_type="application/octet-stream",
    )


def _content(store: BlobStore, header: bytes, digests: Sequence[str], size: int) -> Iterator[bytes]:
    """The header, then the data of one T after the other, `size` bytes each; never more than a block in memory."""

    def data(digest: str) -> bytes:
        return files.load(store.get(digest))["vector"].astype("<f4", copy=False).tobytes()

    yield header
    step = max(1, BLOCK // size)
    for at in range(0, len(digests), step):
        yield b"".join(side_by_side(data, digests[at : at + step]))
