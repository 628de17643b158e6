"""Keyset pages: the cursor holds the last row's key, so a page costs the same however deep it lies."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Query
from sqlalchemy import ColumnElement, Select, and_, literal, or_, tuple_
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import QueryableAttribute

from tpv.errors import Invalid
from tpv.schemas.base import Page, Paging

Row = TypeVar("Row")
Item = TypeVar("Item")
Column = QueryableAttribute[Any] | ColumnElement[Any]


def _paging(limit: Annotated[int, Query(ge=1, le=1000)] = 100, cursor: str | None = None) -> Paging:
    return Paging(limit=limit, cursor=cursor)


PagingQuery = Annotated[Paging, Depends(_paging)]


async def page(
    session: AsyncSession,
    statement: Select[Row],
    key: Sequence[Column],
    key_of: Callable[[Row], Sequence[Any]],
    view: Callable[[Row], Item],
    paging: Paging,
    *,
    descending: bool | Sequence[bool] = False,
) -> Page[Item]:
    """One page of the statement's rows, ordered by `key`, which is unique and never null; `key_of` reads it off a row.

    `descending` says it of the whole key, or of each part.
    """
    downwards = [descending] * len(key) if isinstance(descending, bool) else list(descending)
    if paging.cursor:
        last = _decode(paging.cursor, len(key))
        bound = [literal(value).cast(column.type) for value, column in zip(last, key, strict=True)]
        statement = statement.where(_after(key, bound, downwards))
    ordered = statement.order_by(
        *(column.desc() if down else column for column, down in zip(key, downwards, strict=True))
    )
    rows = (await session.scalars(ordered.limit(paging.limit + 1))).all()
    more = len(rows) > paging.limit
    rows = rows[: paging.limit]
    return Page(items=[view(row) for row in rows], next_cursor=_encode(key_of(rows[-1])) if more else None)


def _after(
    key: Sequence[Column], bound: Sequence[ColumnElement[Any]], downwards: Sequence[bool]
) -> ColumnElement[bool]:
    """Whether a row comes after the bound."""
    if len(set(downwards)) == 1:  # an index answers this one
        return tuple_(*key) < tuple_(*bound) if downwards[0] else tuple_(*key) > tuple_(*bound)
    equal = [column == value for column, value in zip(key, bound, strict=True)]
    later = [c < v if down else c > v for c, v, down in zip(key, bound, downwards, strict=True)]
    return or_(*(and_(*equal[:i], further) for i, further in enumerate(later)))


def _encode(key: Sequence[Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps([str(part) for part in key]).encode()).decode()


def _decode(cursor: str, length: int) -> list[str]:
    try:
        key = json.loads(base64.urlsafe_b64decode(cursor.encode()))
    except (ValueError, RecursionError):
        key = None
    if not (isinstance(key, list) and len(key) == length and all(isinstance(part, str) for part in key)):
        raise Invalid("the cursor is none that this service gave; leave it out to begin at the start")
    return key
