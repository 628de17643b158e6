"""A creating request that is sent twice with one `Idempotency-Key` has one effect and one answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import Depends, Header, Request
from fastapi.encoders import jsonable_encoder
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from sqlalchemy import bindparam, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from tpv.errors import IdempotencyConflict
from tpv_service.db import Table
from tpv_service.registry.tables import IdempotencyRow

# Of the tables, not the mapped classes: no loaded row has to be looked through afterwards.
_TABLE = Table.metadata.tables[IdempotencyRow.__tablename__]
_CLAIM = insert(_TABLE).on_conflict_do_nothing().returning(_TABLE.c.key)
_KEEP = (
    update(_TABLE)
    .where(_TABLE.c.actor == bindparam("of_actor"), _TABLE.c.key == bindparam("of_key"))
    .values(answer=bindparam("answer"), status=bindparam("status"))
)

KeyHeader = Annotated[str | None, Header(alias="Idempotency-Key", min_length=1, max_length=255)]


class Idempotency:
    """Of one request. `begin` gives the kept answer of an earlier one, `finish` keeps this one's.

    Both work in the request's transaction: a request that fails leaves no key behind, and a second one that arrives
    meanwhile waits for the first. Where names are resolved before that, `kept` comes first: what they meant may be
    gone since.
    """

    def __init__(self, path: str, key: str | None) -> None:
        self.path, self.key = path, key

    async def begin(self, session: AsyncSession, actor: str, *asked: Any) -> JSONResponse | None:
        """The answer that the same key got before; raises IdempotencyConflict when that asked for something else."""
        if self.key is None:
            return None
        self.actor = actor
        claimed = await session.scalar(_CLAIM, {"actor": actor, "key": self.key, "request": self._digest(asked)})
        return None if claimed is not None else await self.kept(session, actor, *asked)

    async def kept(self, session: AsyncSession, actor: str, *asked: Any) -> JSONResponse | None:
        """What `begin` gives, without a claim of the key."""
        self.actor = actor
        mine = IdempotencyRow.actor == actor, IdempotencyRow.key == self.key
        kept = await session.scalar(select(IdempotencyRow).where(*mine)) if self.key is not None else None
        if kept is None:
            return None
        if kept.request != self._digest(asked):
            raise IdempotencyConflict(
                f"the key {self.key!r} was sent with another request; use a new key for a new one"
            )
        return JSONResponse(kept.answer, kept.status or 200)

    async def finish(self, session: AsyncSession, answer: BaseModel, status: int) -> JSONResponse:
        """Keeps the answer under the key, and gives it as the response."""
        body: Mapping[str, Any] = answer.model_dump(mode="json")
        if self.key is not None:
            kept = {"of_actor": self.actor, "of_key": self.key, "answer": body, "status": status}
            await session.execute(_KEEP, kept)
        return JSONResponse(body, status)

    def _digest(self, asked: Any) -> str:
        return hashlib.sha256(json.dumps([self.path, jsonable_encoder(asked)], sort_keys=True).encode()).hexdigest()


async def _of_request(request: Request, key: KeyHeader = None) -> Idempotency:
    return Idempotency(request.url.path, key)


IdempotentRequest = Annotated[Idempotency, Depends(_of_request)]
