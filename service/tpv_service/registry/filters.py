"""Which versions a filter means, and the search for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, NamedTuple
from uuid import UUID

from fastapi import APIRouter, Depends
from sqlalchemy import (
    ColumnElement,
    ScalarSelect,
    Select,
    Text,
    and_,
    false,
    func,
    literal,
    not_,
    or_,
    select,
    true,
    tuple_,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import aliased

from tpv.references import Reference
from tpv.schemas.base import Page
from tpv.schemas.filters import Filter, MetricCondition, MetricKey, SortKey, VersionSearch
from tpv.schemas.vectors import Version
from tpv_service.auth.tokens import Actor, Allowed
from tpv_service.db import ReadOnlySession
from tpv_service.pagination import Column, page
from tpv_service.registry import queries
from tpv_service.registry.tables import (
    AliasRow,
    BaseModelRow,
    EvaluationRow,
    InitializationRow,
    VectorRow,
    VersionRow,
)
from tpv_service.registry.views import version_view

router = APIRouter(tags=["versions"])
Reader = Annotated[Actor, Depends(Allowed("read", "write", "worker"))]


@router.post("/vectors/search")
async def search_versions(session: ReadOnlySession, _: Reader, asked: VersionSearch) -> Page[Version]:
    """The versions that pass the filter; by default the newest of each vector, by name."""
    key = [part for sort in asked.sort for part in _sort_key(sort)] + [
        _Key(VectorRow.namespace, lambda row: row.vector.namespace),
        _Key(VectorRow.name, lambda row: row.vector.name),
        _Key(VersionRow.number, lambda row: row.number),
    ]
    return await page(
        session,
        queries.full_version().where(chosen(asked.versions, asked.filter), condition(asked.filter)),
        [part.column for part in key],
        lambda row: [part.of(row) for part in key],
        version_view,
        asked,
        descending=[part.descending for part in key],
    )


def condition(asked: Filter) -> ColumnElement[bool]:
    """The filter over a statement that selects from VersionRow joined with `VersionRow.vector`.

    It is true or false for every row, never null, so that `not` is the complement. It says nothing about deletion.
    """
    return and_(true(), *_conditions(asked))


def chosen(versions: str, asked: Filter | None = None) -> ColumnElement[bool]:
    """`newest`, `all` or `alias:NAME`, over the same kind of statement; never a deleted version.

    The newest version is the vector's own, or where the filter beside it demands an initialization, the newest of
    that; whatever else the filter says: a vector whose newest version does not pass has none that does.
    """
    kept = and_(VersionRow.deleted_at.is_(None), VectorRow.deleted_at.is_(None))
    if versions == "all":
        return kept
    if versions.startswith("alias:"):
        return and_(kept, _has_alias(versions.removeprefix("alias:")))
    newer = aliased(VersionRow)
    is_newer = (newer.vector_id == VersionRow.vector_id) & (newer.number > VersionRow.number)
    if any(demanded_initializations(asked)):
        is_newer &= newer.initialization_id == VersionRow.initialization_id
    return and_(kept, not_(_there_is(select(newer.id).where(is_newer, newer.deleted_at.is_(None)))))


def demanded_initializations(asked: Filter | None) -> Iterator[str]:
    """Those that whatever passes the filter is of."""
    if asked is not None:
        if asked.initialization is not None:
            yield asked.initialization
        for part in asked.all or ():
            yield from demanded_initializations(part)


def _conditions(asked: Filter) -> Iterator[ColumnElement[bool]]:
    if asked.names is not None:
        paths = [Reference.parse(name) for name in asked.names]
        listed = func.unnest(_texts(p.namespace for p in paths), _texts(p.name or "" for p in paths))
        names = listed.table_valued("namespace", "name").render_derived()
        yield tuple_(VectorRow.namespace, VectorRow.name).in_(select(names.c.namespace, names.c.name))
    if asked.namespace is not None:
        yield VectorRow.namespace == asked.namespace
    if asked.task is not None:
        yield VectorRow.tasks.contains([asked.task])
    if asked.task_type is not None:
        yield VectorRow.task_type.is_not_distinct_from(asked.task_type)
    if asked.base_model is not None:
        models = select(InitializationRow.id).join(InitializationRow.base_model)
        yield _has_initialization(models.where(BaseModelRow.name == asked.base_model))
    if asked.initialization is not None:
        yield _has_initialization(select(InitializationRow.id).where(_named(Reference.parse(asked.initialization))))
    if asked.tags is not None:
        yield VectorRow.tags.contains(asked.tags)
    if asked.alias is not None:
        yield _has_alias(asked.alias)
    if asked.method is not None:
        yield VersionRow.method.is_not_distinct_from(asked.method)
    for metric in asked.metrics or ():
        yield _there_is(_evaluations(metric))
    if asked.created_after is not None:
        yield VersionRow.created_at >= asked.created_after
    if asked.created_before is not None:
        yield VersionRow.created_at < asked.created_before
    if asked.all is not None:
        yield and_(true(), *map(condition, asked.all))
    if asked.any is not None:
        yield or_(false(), *map(condition, asked.any))
    if asked.not_ is not None:
        yield not_(condition(asked.not_))


def _has_initialization(ids: Select[UUID]) -> ColumnElement[bool]:
    return VersionRow.initialization_id.in_(ids.correlate(None))


def _named(reference: Reference) -> ColumnElement[bool]:
    if reference.id:
        return InitializationRow.id == reference.id
    if reference.fingerprint:
        return InitializationRow.fingerprint == reference.fingerprint
    return and_(InitializationRow.namespace == reference.namespace, InitializationRow.name == reference.name)


def _has_alias(alias: str) -> ColumnElement[bool]:
    return _there_is(
        select(AliasRow.version).where(
            AliasRow.vector_id == VersionRow.vector_id, AliasRow.version == VersionRow.number, AliasRow.alias == alias
        )
    )


def _evaluations(asked: MetricCondition) -> Select[UUID]:
    statement = select(EvaluationRow.id).where(
        EvaluationRow.version_id == VersionRow.id, EvaluationRow.metric == asked.metric
    )
    if asked.dataset is not None:
        statement = statement.where(EvaluationRow.dataset == asked.dataset)
    if asked.split is not None:
        statement = statement.where(EvaluationRow.split == asked.split)
    if asked.at_least is not None:
        statement = statement.where(EvaluationRow.value >= asked.at_least)
    if asked.at_most is not None:
        statement = statement.where(EvaluationRow.value <= asked.at_most)
    return statement


def _there_is(statement: Select[Any]) -> ColumnElement[bool]:
    # With these two alone, whatever else a caller has joined: a condition looks into the other tables by itself.
    return statement.correlate(VersionRow, VectorRow).exists()


def _texts(values: Iterable[str]) -> ColumnElement[Any]:
    return literal(list(values), ARRAY(Text()))


class _Key(NamedTuple):
    """A part of the order of a search: in SQL, and read off a row for the cursor."""

    column: Column
    of: Callable[[VersionRow], Any]
    descending: bool = False


def _sort_key(asked: SortKey) -> Iterator[_Key]:
    match asked.by:
        case "name":
            yield _Key(VectorRow.namespace, lambda row: row.vector.namespace, asked.descending)
            yield _Key(VectorRow.name, lambda row: row.vector.name, asked.descending)
        case "created_at":
            yield _Key(VersionRow.created_at, lambda row: row.created_at, asked.descending)
        case "norm":
            yield _Key(VersionRow.norm, lambda row: row.norm, asked.descending)
        case MetricKey() as by:
            value = _latest(by)
            yield _Key(value.is_(None), lambda row: _figure(row, by) is None)
            yield _Key(func.coalesce(value, 0.0), lambda row: _figure(row, by) or 0.0, asked.descending)


def _latest(asked: MetricKey) -> ScalarSelect[float]:
    return (
        select(EvaluationRow.value)
        .where(
            EvaluationRow.version_id == VersionRow.id,
            EvaluationRow.metric == asked.metric,
            EvaluationRow.dataset == asked.dataset,
            EvaluationRow.split == asked.split,
        )
        .order_by(EvaluationRow.id.desc())
        .limit(1)
        .correlate(VersionRow)
        .scalar_subquery()
    )


def _figure(row: VersionRow, asked: MetricKey) -> float | None:
    """What `_latest` gives for a loaded version, whose evaluations are in the order of their ids."""
    wanted = (asked.metric, asked.dataset, asked.split)
    return next((e.value for e in reversed(row.evaluations) if (e.metric, e.dataset, e.split) == wanted), None)
