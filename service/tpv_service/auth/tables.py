"""Table of the access tokens."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy.orm import Mapped, mapped_column

from tpv_service.db import CreatedAt, Id, Table


class TokenRow(Table):
    """An access token; only its sha256 is kept, the token itself is shown once."""

    __tablename__ = "tokens"

    id: Mapped[Id]
    name: Mapped[str] = mapped_column(unique=True)
    sha256: Mapped[str] = mapped_column(unique=True)
    scopes: Mapped[list[str]]
    created_by: Mapped[str]
    created_at: Mapped[CreatedAt]
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
