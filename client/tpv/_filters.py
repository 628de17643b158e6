"""Filters as keyword arguments: `task="nli", tags={"team": "a"}` beside a whole `Filter`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, TypedDict

from tpv import _base
from tpv.schemas.filters import Filter, MetricCondition


class Conditions(TypedDict, total=False):
    """The conditions of a Filter that a call takes by name; all of them must hold."""

    names: Sequence[str] | None
    namespace: str | None
    task: str | None
    task_type: str | None
    base_model: str | None
    initialization: str | None
    tags: Mapping[str, str] | None
    alias: str | None
    method: str | None
    metrics: Sequence[MetricCondition | Mapping[str, Any]] | None
    created_after: datetime | None
    created_before: datetime | None


def filter_of(given: Filter | None, conditions: Mapping[str, Any]) -> Filter | None:
    """The filter and the conditions together; None when there is neither."""
    named = _base.given(**conditions)
    if not named:
        return given
    return _base.message(Filter, **named, **_base.given(all=[given] if given else None))
