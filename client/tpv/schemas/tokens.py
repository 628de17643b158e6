"""Access tokens on the wire."""

from __future__ import annotations

from typing import Literal

Scope = Literal["read", "write", "worker", "admin"]
SCOPES: tuple[Scope, ...] = ("read", "write", "worker", "admin")
