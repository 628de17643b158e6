"""Soft prompts of versions: P = P_init + scale * T, computed when they are asked for."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from tpv import files
from tpv.schemas.base import Name
from tpv.vectors import TaskPromptVector
from tpv_service.auth.tokens import Actor, Allowed
from tpv_service.content import computed_response
from tpv_service.db import Session, release
from tpv_service.registry import publish, queries
from tpv_service.registry.compatibility import are_mixed
from tpv_service.registry.tables import InitializationRow, VersionRow
from tpv_service.registry.views import version_reference
from tpv_service.storage import BlobStore

router = APIRouter(tags=["versions"])
Reader = Annotated[Actor, Depends(Allowed("read", "write", "worker"))]


@router.get("/vectors/{namespace}/{name}/versions/{v}/prompt", response_class=Response)
async def get_prompt(
    request: Request,
    session: Session,
    _: Reader,
    namespace: Name,
    name: Name,
    v: str,
    initialization: Annotated[str | None, Query(description="Name, id or fingerprint; default: the vector's.")] = None,
    scale: Annotated[float, Query(allow_inf_nan=False)] = 1.0,
    allow_mixed_initializations: Annotated[
        bool, Query(description="Also another initialization of the same base model and shape.")
    ] = False,
) -> Response:
    """P_init + scale * T as safetensors, tensor `prompt`; the file's metadata say which P_init and scale."""
    version = await queries.version_at(session, namespace, name, v)
    start = version.initialization
    await release(session)
    if initialization is not None:
        start = await request.state.initializations.resolve(initialization)
        named = version_reference(version), version.initialization
        are_mixed(named, ("the prompt asked for", start), allowed=allow_mixed_initializations)
    content = await run_in_threadpool(_prompt, request.state.store, version, start, scale)
    return computed_response(
        request,
        content,
        media_type="application/octet-stream",
        filename=f"{name}-{version.number}-prompt.safetensors",
    )


def _prompt(store: BlobStore, version: VersionRow, initialization: InitializationRow, scale: float) -> bytes:
    vector = TaskPromptVector(files.load(store.get(version.digest))["vector"], version.initialization.fingerprint)
    with np.errstate(over="ignore", invalid="ignore"):  # refused by name
        prompt = vector.apply(publish.load_start(store, initialization.digest), scale, allow_mixed_initializations=True)
    said = {
        "vector": version_reference(version),
        "vector_fingerprint": version.fingerprint,
        "initialization": initialization.fingerprint,
        "scale": repr(scale),
    }
    return files.dump({"prompt": prompt}, said)
