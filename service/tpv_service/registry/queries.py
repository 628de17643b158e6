"""Questions to the registry's tables. Nothing here commits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal, NamedTuple, NoReturn
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Integer,
    Select,
    Text,
    Uuid,
    bindparam,
    column,
    func,
    or_,
    select,
)
from sqlalchemy.dialects.postgresql import ARRAY, distinct_on
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import aliased, contains_eager, joinedload, load_only, selectinload
from sqlalchemy.types import TypeEngine

from tpv.errors import InvalidReference, NotFound
from tpv.references import Reference, check_alias
from tpv_service.jobs.tables import JobRow
from tpv_service.registry.tables import AliasRow, BaseModelRow, InitializationRow, ParentRow, VectorRow, VersionRow

_NOT_DELETED = (VersionRow.deleted_at.is_(None), VectorRow.deleted_at.is_(None))

NEWEST: Literal["newest"] = "newest"  #: in a path: the newest version that is not deleted
SelectorKind = Literal["number", "alias", "newest"]


def full_initialization() -> Select[InitializationRow]:
    return select(InitializationRow).options(joinedload(InitializationRow.base_model, innerjoin=True))


def bare_version() -> Select[VersionRow]:
    """Versions with vector, initialization and base model: three joins, one statement."""
    return (
        select(VersionRow)
        .join(VersionRow.vector)
        .options(
            contains_eager(VersionRow.vector),
            joinedload(VersionRow.initialization, innerjoin=True).joinedload(
                InitializationRow.base_model, innerjoin=True
            ),
        )
        .execution_options(populate_existing=True)
    )


def full_version() -> Select[VersionRow]:
    """Versions with all that an answer shows."""
    return bare_version().options(
        selectinload(VersionRow.aliases),
        selectinload(VersionRow.parents),
        selectinload(VersionRow.evaluations),
    )


def named(reference: Reference) -> ColumnElement[bool]:
    return (VectorRow.namespace == reference.namespace) & (VectorRow.name == reference.name)


async def resolve_version(session: AsyncSession, reference: str, *, deleted: bool = False) -> VersionRow:
    """The version that a reference means now: `[ns/]name`, `name:3`, `name@alias`, or an id. A deleted one if asked."""
    row = await _resolve_one(session, Reference.parse(reference), deleted=deleted)
    if row is None:
        raise NotFound(f"there is no vector {reference}; see: tpv vector list", reference=reference)
    return row


async def _resolve_one(
    session: AsyncSession, reference: Reference, *, deleted: bool = False, pooled: bool = False
) -> VersionRow | None:
    _check_names_vector(reference)
    if reference.id:
        by_id = _by_id(deleted=deleted, pooled=pooled)
        return (await session.scalars(by_id, {"value": reference.id})).first()
    kind: SelectorKind = "number" if reference.version else "alias" if reference.alias else NEWEST
    by_name = _by_name(kind, deleted=deleted, pooled=pooled)
    asked = {"namespace": reference.namespace, "name": reference.name, "value": reference.version or reference.alias}
    return (await session.scalars(by_name, asked)).first()


@cache  # composing it takes a millisecond
def _by_id(*, deleted: bool, pooled: bool) -> Select[VersionRow]:
    return _one(deleted=deleted, pooled=pooled).where(VersionRow.id == bindparam("value"))


@cache
def _by_name(kind: SelectorKind, *, deleted: bool, pooled: bool) -> Select[VersionRow]:
    place = VectorRow.namespace == bindparam("namespace"), VectorRow.name == bindparam("name")
    return _one(deleted=deleted, pooled=pooled).where(*place, *_selected(kind, bindparam("value")))


def _one(*, deleted: bool, pooled: bool) -> Select[VersionRow]:
    statement = bare_version() if deleted else bare_version().where(*_NOT_DELETED)
    statement = statement.order_by(VersionRow.number.desc()).limit(1)
    return statement.options(*_TO_COMPARE) if pooled else statement


async def resolve_versions(
    session: AsyncSession, references: Sequence[str], *, pooled: bool = False
) -> list[VersionRow]:
    """The not deleted versions that references mean now, in their order, as `resolve_version` does for one.

    One statement, however many they are; it reads their pooled vectors too if asked. Raises InvalidReference for the
    first that names no vector, and NotFound with every reference that means nothing.
    """
    parsed = [Reference.parse(reference) for reference in references]
    for reference in parsed:
        _check_names_vector(reference)
    if len(parsed) == 1:  # the usual case, and one that Postgres need not plan anew each time
        row = await _resolve_one(session, parsed[0], pooled=pooled)
        found = {} if row is None else {1: row}
    else:
        asked = {key: [getattr(reference, key) for reference in parsed] for key in _ASKED}
        found = {place: row for row, place in await session.execute(_resolved(pooled), asked)}
    if missing := list(dict.fromkeys(r for i, r in enumerate(references, 1) if i not in found)):
        shown = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
        raise NotFound(f"there is no vector {shown}; see: tpv vector list", references=missing)
    return [found[place] for place in range(1, len(references) + 1)]


def versions_to_compare() -> Select[VersionRow]:
    """Versions with vector, initialization, and their pooled vectors."""
    return bare_version().options(*_TO_COMPARE)


_ASKED: dict[str, TypeEngine[Any]] = {
    "id": Uuid(),
    "namespace": Text(),
    "name": Text(),
    "version": Integer(),
    "alias": Text(),
}


#: What similarities are computed and told from. To read the rest as well takes a search a tenth of its time; versions
#: that the session has already lose theirs, and what is needed of these is taken before.
_TO_COMPARE = (
    load_only(
        *(VersionRow.id, VersionRow.vector_id, VersionRow.initialization_id, VersionRow.number, VersionRow.digest),
        VersionRow.pooled,
    ),
    contains_eager(VersionRow.vector).load_only(VectorRow.id, VectorRow.namespace, VectorRow.name, VectorRow.tasks),
)


@cache  # composing it takes a millisecond
def _resolved(pooled: bool) -> Select[VersionRow, int]:
    """(version, place of its reference from 1 on); the references come as one array for each of their parts."""
    asked = (
        func.unnest(*(bindparam(key, type_=ARRAY(type_)) for key, type_ in _ASKED.items()))
        .table_valued(*(column(key, type_) for key, type_ in _ASKED.items()), with_ordinality="place")
        .render_derived(name="asked")
    )
    version, vector, alias = aliased(VersionRow), aliased(VectorRow), aliased(AliasRow)
    there = select(version.id).join(version.vector.of_type(vector))
    there = there.where(vector.deleted_at.is_(None), version.deleted_at.is_(None))
    points_here = (
        select(alias.version).where(alias.vector_id == vector.id, alias.alias == asked.c.alias).correlate(vector, asked)
    )
    by_name = there.where(
        vector.namespace == asked.c.namespace,
        vector.name == asked.c.name,
        or_(asked.c.version.is_(None), version.number == asked.c.version),
        or_(asked.c.alias.is_(None), version.number == points_here.scalar_subquery()),
    )
    newest = by_name.order_by(version.number.desc()).limit(1).correlate(asked).scalar_subquery()
    by_id = there.where(version.id == asked.c.id).correlate(asked).scalar_subquery()
    # Materialized, so that Postgres begins here whatever it believes of tables that it has not analyzed yet: it took
    # 4 s for 256 references to 4,000 new vectors.
    meant = select(func.coalesce(by_id, newest).label("id"), asked.c.place).cte("meant").prefix_with("materialized")
    statement = bare_version().add_columns(meant.c.place).join(meant, VersionRow.id == meant.c.id)
    return statement.options(*_TO_COMPARE) if pooled else statement


def _check_names_vector(reference: Reference) -> None:
    if reference.fingerprint:
        raise InvalidReference(
            f"{reference}: a vector is referred to by name or id, for one content may have many names"
        )


async def version_at(
    session: AsyncSession, namespace: str, name: str, selector: str, *, deleted: bool = False
) -> VersionRow:
    """The version at a path: `{v}` is a number, `@alias` or `newest`. With `deleted`, a number may be a deleted one."""
    kind, value = _parse(selector)
    statement = full_version().where(named(Reference(namespace, name)), VectorRow.deleted_at.is_(None))
    statement = statement.where(*_selected(kind, value)).order_by(VersionRow.number.desc()).limit(1)
    if not (deleted and kind == "number"):
        statement = statement.where(VersionRow.deleted_at.is_(None))
    row = (await session.scalars(statement)).first()
    return row or _missing(namespace, name, selector)


class VersionFiles(NamedTuple):
    """What a version has in the blob store."""

    number: int
    digest: str
    state: str | None


async def files_at(session: AsyncSession, namespace: str, name: str, selector: str) -> VersionFiles:
    """The files of the version at a path, which is not deleted."""
    kind, value = _parse(selector)
    row = (await session.execute(_files(kind), {"namespace": namespace, "name": name, "value": value})).first()
    return VersionFiles(*row) if row else _missing(namespace, name, selector)


@cache  # composing it for every download would take as long as Postgres does
def _files(kind: SelectorKind) -> Select[int, str, str | None]:
    return (
        select(VersionRow.number, VersionRow.digest, VersionRow.state)
        .join(VersionRow.vector)
        .where(
            VectorRow.namespace == bindparam("namespace"),
            VectorRow.name == bindparam("name"),
            *_NOT_DELETED,
            *_selected(kind, bindparam("value")),
        )
        .order_by(VersionRow.number.desc())
        .limit(1)
    )


def _parse(selector: str) -> tuple[SelectorKind, int | str | None]:
    """What `{v}` of a path says; raises InvalidReference."""
    if selector == NEWEST:
        return "newest", None
    if selector.startswith("@"):
        return "alias", check_alias(selector[1:])
    if re.fullmatch(r"[1-9][0-9]{0,8}", selector):
        return "number", int(selector)
    raise InvalidReference(f"{selector!r} is no version: use a number, @alias or {NEWEST}")


def _missing(namespace: str, name: str, selector: str) -> NoReturn:
    vector = Reference(namespace, name)
    shown = f"{vector}{'' if selector == NEWEST else selector if selector[0] == '@' else ':' + selector}"
    raise NotFound(f"there is no vector {shown}; see: tpv vector show {vector}", reference=shown)


def _selected(kind: SelectorKind, value: Any) -> Sequence[ColumnElement[bool]]:
    match kind:
        case "number":
            return [VersionRow.number == value]
        case "alias":
            points_here = select(AliasRow.version).where(
                AliasRow.vector_id == VersionRow.vector_id, AliasRow.alias == value
            )
            return [VersionRow.number == points_here.scalar_subquery()]
        case "newest":
            return []


async def vector_by_name(
    session: AsyncSession, namespace: str, name: str, *, lock: bool = False, deleted: bool = False
) -> VectorRow:
    statement = select(VectorRow).where(named(Reference(namespace, name))).options(selectinload(VectorRow.aliases))
    if lock:
        statement = statement.with_for_update()
    row = (await session.scalars(statement.execution_options(populate_existing=True))).first()
    if row is None or (row.deleted_at and not deleted):
        hint = f"restore it: tpv vector restore {namespace}/{name}" if row else "see: tpv vector list"
        raise NotFound(f"there is no vector {namespace}/{name}; {hint}", reference=f"{namespace}/{name}")
    return row


async def newest_version_numbers(session: AsyncSession, vectors: Sequence[UUID]) -> dict[UUID, int]:
    """The newest not deleted version's number of each vector that has one."""
    rows = await session.execute(
        select(VersionRow.vector_id, VersionRow.number)
        .ext(distinct_on(VersionRow.vector_id))
        .where(VersionRow.vector_id.in_(vectors), VersionRow.deleted_at.is_(None))
        .order_by(VersionRow.vector_id, VersionRow.number.desc())
    )
    return dict(rows.all())


async def base_models_of(session: AsyncSession, vectors: Sequence[UUID]) -> dict[UUID, list[str]]:
    """The names of the base models that each vector's versions belong to."""
    rows = await session.execute(
        select(VersionRow.vector_id, BaseModelRow.name)
        .join(VersionRow.initialization)
        .join(InitializationRow.base_model)
        .where(VersionRow.vector_id.in_(vectors))
        .distinct()
        .order_by(VersionRow.vector_id, BaseModelRow.name)
    )
    found: dict[UUID, list[str]] = {}
    for vector, name in rows:
        found.setdefault(vector, []).append(name)
    return found


async def resolve_initialization(
    session: AsyncSession, reference: str, namespace: str | None = None
) -> InitializationRow:
    """The initialization with this name, id or fingerprint."""
    parsed = Reference.parse(reference if namespace is None else _within(namespace, reference))
    if parsed.version is not None or parsed.alias is not None:
        raise InvalidReference(f"{reference}: an initialization has no versions; use its name alone")
    statement = full_initialization()
    if parsed.id:
        statement = statement.where(InitializationRow.id == parsed.id)
    elif parsed.fingerprint:
        statement = statement.where(InitializationRow.fingerprint == parsed.fingerprint)
    else:
        statement = statement.where(
            InitializationRow.namespace == parsed.namespace, InitializationRow.name == parsed.name
        )
    rows = (await session.scalars(statement.limit(2))).all()
    if not rows:
        raise NotFound(f"there is no initialization {reference}; see: tpv init list", reference=reference)
    if len(rows) > 1:
        raise InvalidReference(f"{reference} is used with several base models; use the initialization's name or id")
    return rows[0]


class KnownInitializations:
    """Initializations that were asked for by name or id. They never change, so one look into the database is enough."""

    def __init__(self, readers: async_sessionmaker[AsyncSession]) -> None:
        self._readers = readers
        self._known: dict[str, InitializationRow] = {}

    async def resolve(self, reference: str) -> InitializationRow:
        """`resolve_initialization`, from memory if it was asked before."""
        if row := self._known.get(reference):
            return row
        async with self._readers() as session:
            row = await resolve_initialization(session, reference)
        if not reference.startswith("sha256:"):  # a second base model may have the same tensor one day
            self._known[reference] = row
        return row


def _within(namespace: str, reference: str) -> str:
    """A bare name read inside a path's namespace; ids and fingerprints are the same everywhere."""
    parsed = Reference.parse(reference)
    return reference if parsed.id or parsed.fingerprint else f"{namespace}/{reference}"


async def live_descendants(session: AsyncSession, versions: Sequence[UUID]) -> Sequence[str]:
    """References of not deleted versions that were made from one of these."""
    rows = await session.execute(
        select(VectorRow.namespace, VectorRow.name, VersionRow.number)
        .join(VersionRow.vector)
        .join(ParentRow, ParentRow.version_id == VersionRow.id)
        .where(ParentRow.parent_id.in_(versions), VersionRow.deleted_at.is_(None), VersionRow.id.not_in(versions))
        .distinct()
        .limit(10)
    )
    return [f"{namespace}/{name}:{number}" for namespace, name, number in rows]


async def reload_version(session: AsyncSession, row: VersionRow) -> VersionRow:
    """The same version with all that an answer shows, as this transaction sees it."""
    return (await session.execute(full_version().where(VersionRow.id == row.id))).scalar_one()


async def live_jobs_using(session: AsyncSession, versions: Sequence[UUID]) -> Sequence[UUID]:
    """Jobs that are queued or running and were given one of these versions."""
    statement = select(JobRow.id).where(
        JobRow.state.in_(["queued", "running"]),
        or_(
            *(
                JobRow.spec.contains({"target": {"version_id": str(version)}})
                | JobRow.spec.contains({"sources": [{"version_id": str(version)}]})
                for version in versions
            )
        ),
    )
    return (await session.scalars(statement.limit(10))).all() if versions else []


async def live_jobs_making(session: AsyncSession, namespace: str, name: str) -> Sequence[UUID]:
    """Jobs that are queued or running and will register under this name."""
    where = JobRow.output_namespace == namespace, JobRow.output_name == name
    return (await session.scalars(select(JobRow.id).where(JobRow.state.in_(["queued", "running"]), *where))).all()
