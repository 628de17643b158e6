"""The lineage of a version on the wire: what it was made from, and what was made from it."""

from __future__ import annotations

from uuid import UUID

from tpv.schemas.base import Answer

MAX_NODES = 1000  #: in each direction, the version itself included
MAX_EDGES = 10_000


class LineageNode(Answer):
    reference: str
    fingerprint: str
    method: str | None
    job: UUID | None
    deleted: bool


class LineageEdge(Answer):
    """`child` was made from `parent`."""

    parent: str
    child: str
    role: str
    weight: float | None


class Lineage(Answer):
    """The ancestors and descendants of `reference` with it, oldest first, and every edge between these."""

    reference: str
    nodes: list[LineageNode]
    edges: list[LineageEdge]
    truncated: bool  #: there is more than the limits let through; the nearest are here
