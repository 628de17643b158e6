"""Soft prompts of versions: P = P_init + scale * T, computed when they are asked for."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated
from zipfile import ZipFile, ZipInfo

import numpy as np
from fastapi import APIRouter, Depends, Query
from fastapi import Request as HttpRequest
from fastapi.responses import Response
from pydantic import Field
from starlette.concurrency import run_in_threadpool

from tpv import files, peft
from tpv.schemas.base import Name, Request
from tpv.vectors import TaskPromptVector
from tpv_service.auth.tokens import Actor, Allowed
from tpv_service.content import computed_response
from tpv_service.db import Session, release
from tpv_service.registry import publish, queries
from tpv_service.registry.compatibility import are_mixed
from tpv_service.registry.tables import InitializationRow, VersionRow
from tpv_service.registry.views import version_reference
from tpv_service.storage import BlobStore

router = APIRouter(tags=["versions"], prefix="/vectors/{namespace}/{name}/versions/{v}")
Reader = Annotated[Actor, Depends(Allowed("read", "write", "worker"))]


class PromptQuery(Request):
    """Which soft prompt of a version is wanted."""

    initialization: str | None = Field(None, description="Name, id or fingerprint; default: the vector's.")
    scale: float = Field(1.0, allow_inf_nan=False)
    allow_mixed_initializations: bool = Field(
        False, description="Also another initialization of the same base model and shape."
    )


class PeftQuery(PromptQuery):
    task_type: peft.TaskType | None = Field(
        None, description="PEFT's word for the kind of model; default: by the base model's architecture."
    )


@router.get("/prompt", response_class=Response)
async def get_prompt(
    request: HttpRequest,
    session: Session,
    _: Reader,
    namespace: Name,
    name: Name,
    v: str,
    asked: Annotated[PromptQuery, Query()],
) -> Response:
    """P_init + scale * T as safetensors, tensor `prompt`; the file's metadata say which P_init and scale."""
    version, start = await _resolve(request, session, namespace, name, v, asked)
    content = await run_in_threadpool(_prompt, request.state.store, version, start, asked.scale)
    return computed_response(
        request,
        content,
        media_type="application/octet-stream",
        filename=f"{name}-{version.number}-prompt.safetensors",
    )


@router.get("/peft", response_class=Response)
async def get_peft(
    request: HttpRequest,
    session: Session,
    _: Reader,
    namespace: Name,
    name: Name,
    v: str,
    asked: Annotated[PeftQuery, Query()],
) -> Response:
    """P_init + scale * T as a ZIP archive of the directory that `peft.PeftModel.from_pretrained` loads."""
    version, start = await _resolve(request, session, namespace, name, v, asked)
    kind = asked.task_type or peft.task_type_of(start.base_model.architecture)
    content = await run_in_threadpool(_archive, request.state.store, version, start, asked.scale, kind)
    return computed_response(
        request, content, media_type="application/zip", filename=f"{name}-{version.number}-peft.zip"
    )


async def _resolve(
    request: HttpRequest, session: Session, namespace: str, name: str, v: str, asked: PromptQuery
) -> tuple[VersionRow, InitializationRow]:
    """The version, and the P_init to add it to."""
    version = await queries.version_at(session, namespace, name, v)
    start = version.initialization
    await release(session)
    if asked.initialization is not None:
        start = await request.state.initializations.resolve(asked.initialization)
        own = version_reference(version), version.initialization
        are_mixed(own, ("the prompt asked for", start), allowed=asked.allow_mixed_initializations)
    return version, start


def _archive(
    store: BlobStore, version: VersionRow, initialization: InitializationRow, scale: float, kind: peft.TaskType
) -> bytes:
    content = BytesIO()
    with TemporaryDirectory() as directory, ZipFile(content, "w") as archive:
        written = _vector(store, version).to_peft(
            Path(directory) / "peft",
            publish.load_start(store, initialization.digest),
            base_model=initialization.base_model.name,
            revision=initialization.base_model.revision,
            task_type=kind,
            scale=scale,
            reference=version_reference(version),
            allow_mixed_initializations=True,
        )
        for file in sorted(written.iterdir()):  # without times: the same content has the same ETag
            archive.writestr(ZipInfo(file.name), file.read_bytes())
    return content.getvalue()


def _vector(store: BlobStore, version: VersionRow) -> TaskPromptVector:
    return TaskPromptVector(files.load(store.get(version.digest))["vector"], version.initialization.fingerprint)


def _prompt(store: BlobStore, version: VersionRow, initialization: InitializationRow, scale: float) -> bytes:
    with np.errstate(over="ignore", invalid="ignore"):  # refused by name
        start = publish.load_start(store, initialization.digest)
        prompt = _vector(store, version).apply(start, scale, allow_mixed_initializations=True)
    said = {
        "vector": version_reference(version),
        "vector_fingerprint": version.fingerprint,
        "initialization": initialization.fingerprint,
        "scale": repr(scale),
    }
    return files.dump({"prompt": prompt}, said)
