"""Access tokens: made, listed, revoked, and checked on every request."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from fastapi import Request
from sqlalchemy import exists, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from tpv.errors import Conflict, Forbidden, NotFound, Unauthorized
from tpv.references import check_name
from tpv.schemas.tokens import SCOPES, Scope
from tpv_service.auth.tables import TokenRow

_PREFIX = "tpv_"  # lets secret scanners recognise a token


@dataclass(frozen=True)
class Actor:
    """Who makes a request, and what they may do."""

    name: str
    scopes: frozenset[Scope]


LOCAL = Actor("local", frozenset(SCOPES))


class Allowed:
    """A dependency: the actor of the request, if they have the scope; `admin` has all scopes."""

    def __init__(self, *scopes: Scope) -> None:
        self.scopes = frozenset(scopes) | {"admin"}

    async def __call__(self, request: Request) -> Actor:
        if not request.state.settings.authentication:
            return LOCAL
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Unauthorized("send a token: Authorization: Bearer ... (client and CLI: TPV_TOKEN)")
        async with request.state.readers() as session:
            row = await _valid_token(session, token)
        if row is None:
            raise Unauthorized("the token is unknown, expired or revoked; ask an administrator for a new one")
        actor = Actor(row.name, frozenset(row.scopes))  # type: ignore[arg-type]  # only known scopes are stored
        if not actor.scopes & self.scopes:
            wanted = " or ".join(sorted(self.scopes - {"admin"})) or "admin"
            raise Forbidden(f"token {actor.name!r} lacks the scope {wanted}")
        return actor


async def _valid_token(session: AsyncSession, token: str) -> TokenRow | None:
    return await session.scalar(
        select(TokenRow).where(
            TokenRow.sha256 == _hash(token),
            TokenRow.revoked_at.is_(None),
            func.coalesce(TokenRow.expires_at > func.now(), True),
        )
    )


async def create_token(
    session: AsyncSession,
    *,
    name: str,
    scopes: Sequence[Scope],
    created_by: str,
    lifetime: timedelta | None = None,
    token: str | None = None,
) -> str:
    """Makes a named token and gives it; it is shown this once. Raises Conflict when the name is taken."""
    token = token or _PREFIX + secrets.token_urlsafe(32)
    made = await session.scalar(
        insert(TokenRow)
        .values(
            name=check_name(name, "token name"),
            sha256=_hash(token),
            scopes=sorted(set(scopes)),
            created_by=created_by,
            expires_at=datetime.now(UTC) + lifetime if lifetime else None,
        )
        .on_conflict_do_nothing()
        .returning(TokenRow.id)
    )
    if made is None:
        raise Conflict(f"there is a token {name!r} already; names are permanent, also of revoked tokens")
    return token


async def list_tokens(session: AsyncSession) -> Sequence[TokenRow]:
    return (await session.scalars(select(TokenRow).order_by(TokenRow.created_at))).all()


async def revoke_token(session: AsyncSession, name: str) -> None:
    revoked = await session.scalar(
        update(TokenRow)
        .where(TokenRow.name == name, TokenRow.revoked_at.is_(None))
        .values(revoked_at=func.now())
        .returning(TokenRow.id)
    )
    if revoked is None:
        raise NotFound(f"no token {name!r} that could be revoked; see: tpv admin token list")


async def any_token(session: AsyncSession) -> bool:
    """Whether there is one that somebody could use."""
    expired = TokenRow.expires_at <= func.now()
    return bool(await session.scalar(select(exists().where(TokenRow.revoked_at.is_(None), expired.is_not(True)))))


async def ensure_initial_token(session: AsyncSession, token: str) -> None:
    """The first token comes from the environment; a later start, or another replica's, with the same changes nothing.

    Its name tells tokens apart that were set one after another.
    """
    await session.execute(
        insert(TokenRow)
        .values(
            name=f"initial-{_hash(token)[:8]}",
            sha256=_hash(token),
            scopes=sorted(SCOPES),
            created_by="environment",
        )
        .on_conflict_do_nothing()
    )


def _hash(token: str) -> str:
    """Tokens are 256 random bits, so a plain hash cannot be guessed back; no slow hash is needed."""
    return hashlib.sha256(token.encode()).hexdigest()
