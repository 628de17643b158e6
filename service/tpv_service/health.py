"""Is the process alive, and can it do its work."""

from __future__ import annotations

from fastapi import APIRouter, Request
from sqlalchemy import text
from starlette.concurrency import run_in_threadpool

router = APIRouter(tags=["health"])


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/readyz")
async def readyz(request: Request) -> dict[str, str]:
    """Database and blob store answer; 503 otherwise."""
    async with request.state.readers() as session:
        await session.execute(text("select 1"))
    await run_in_threadpool(request.state.store.check)
    return {"status": "ready"}
