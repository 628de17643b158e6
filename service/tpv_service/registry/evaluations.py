"""Measured figures of versions, and the predictions behind them."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from tpv.errors import NotFound
from tpv.schemas.base import Name
from tpv.schemas.vectors import Evaluation
from tpv_service.auth.tokens import Actor, Allowed
from tpv_service.content import content_response
from tpv_service.db import Session
from tpv_service.registry import queries
from tpv_service.registry.tables import EvaluationRow

router = APIRouter(tags=["evaluations"])
Reader = Annotated[Actor, Depends(Allowed("read", "write", "worker"))]


@router.get("/vectors/{namespace}/{name}/versions/{v}/evaluations")
async def list_evaluations(session: Session, _: Reader, namespace: Name, name: Name, v: str) -> list[Evaluation]:
    """Every figure measured on a version."""
    row = await queries.version_at(session, namespace, name, v)
    return [Evaluation.model_validate(evaluation) for evaluation in row.evaluations]


@router.get("/evaluations/{evaluation}/predictions", response_class=Response)
async def get_predictions(request: Request, _: Reader, evaluation: UUID) -> Response:
    """One JSON line for each row of the split, in its order: `prediction` and `target`."""
    async with request.state.readers() as session:
        row = await session.get(EvaluationRow, evaluation)
    if row is None or row.predictions is None:
        raise NotFound(f"no predictions are kept of evaluation {evaluation}")
    return await content_response(
        request, row.predictions, media_type="application/jsonl", filename=f"{evaluation}.jsonl"
    )
