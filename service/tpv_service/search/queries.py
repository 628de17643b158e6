"""What is compared: the query of a request, and the candidates that it looks at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import UUID

import numpy as np
from fastapi import Request
from numpy.typing import NDArray
from sqlalchemy import (
    CTE,
    LargeBinary,
    ScalarSelect,
    Select,
    Uuid,
    any_,
    bindparam,
    func,
    literal,
    select,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.concurrency import run_in_threadpool

from tpv import files
from tpv.errors import Invalid, InvalidTensor
from tpv.schemas.similarity import LISTED, Pool, PoolEcho, ReferencePool, Term, Uploaded
from tpv.vectors import as_prompt
from tpv_service.db import release
from tpv_service.registry import filters, publish, queries
from tpv_service.registry.compatibility import are_mixed, check_same_initialization, label
from tpv_service.registry.tables import InitializationRow, ParentRow, VectorRow, VersionRow
from tpv_service.registry.views import initialization_summary, version_reference
from tpv_service.search.family import Float32, Mask, Rows, Snapshot, as_bytes, by_age

GIVEN_RULE = "the references given"
ALL_COMPARED = "every candidate was compared"
_RULES = {
    "newest": "the newest not deleted version of each vector of the initialization",
    "all": "every not deleted version of the initialization",
}


@dataclass(frozen=True, kw_only=True)
class Query:
    """What everything else is compared with."""

    label: str
    pooled: Float32  #: (d,)
    initialization: InitializationRow
    others: list[InitializationRow] = field(default_factory=list)  #: of the terms of a mixed combination
    versions: list[VersionRow] = field(default_factory=list)  #: itself, or its terms; none for an uploaded vector
    weights: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))  #: of the versions
    uploaded: Float32 | None = None  #: (r, d)
    task: str | None = None  #: of a target that has no version yet

    @property
    def tasks(self) -> list[str]:
        own = {task for version in self.versions for task in version.vector.tasks}
        return sorted(own | {self.task} if self.task else own)


@dataclass(frozen=True)
class Named:
    """What an answer shows of a version."""

    reference: str
    tasks: list[str]
    task_type: str | None


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Rows of a matrix, some of which are candidates, and why others are not."""

    rule: str
    matrix: Float32  #: (n, d) pooled vectors
    ids: NDArray[Any]  #: (n,) of 16 bytes, the versions' ids
    tasks: Sequence[Sequence[str]] = ()  #: (n,), when the rows are not those of a family
    where: Mask  #: (n,), the rows that are candidates
    mixed: list[InitializationRow] = field(default_factory=list)  #: other initializations than the query's
    excluded: dict[bytes, str] = field(default_factory=dict)  #: id -> why it is none; LISTED of them
    excluded_total: int = 0
    snapshot: Snapshot | None = None  #: when the rows are those of a family

    @property
    def size(self) -> int:
        return int(np.count_nonzero(self.where))

    def rows_of(self, ids: NDArray[Any]) -> Rows:
        """The rows of those versions that are here; `ids` are (m,) of 16 bytes."""
        if self.snapshot is not None:
            return self.snapshot.rows_of(ids)
        wanted = {*ids.tolist()}
        return np.flatnonzero([version in wanted for version in self.ids.tolist()])

    def of_tasks(self, tasks: Sequence[str]) -> Rows:
        """The rows that have one of these tasks."""
        if self.snapshot is not None:
            return self.snapshot.of_tasks(tasks)
        return np.flatnonzero([not {*tasks}.isdisjoint(own) for own in self.tasks])

    def echo(
        self,
        metric: str,
        query: Query,
        shown: Mapping[bytes, Named],
        *,
        how: str = ALL_COMPARED,
        exact: bool = True,
        reference_pool: ReferencePool | None = None,
    ) -> PoolEcho:
        """What an answer says of the pool, and of how its best were found; `shown` has those that are excluded."""
        others = {row.id: row for row in (*query.others, *self.mixed) if row.id != query.initialization.id}
        return PoolEcho(
            rule=self.rule,
            metric=metric,
            initialization=initialization_summary(query.initialization),
            mixed_initializations=[initialization_summary(row) for row in others.values()],
            size=self.size,
            excluded=dict(sorted((shown[version].reference, reason) for version, reason in self.excluded.items())),
            excluded_total=self.excluded_total,
            exact=exact,
            how=how,
            reference_pool=reference_pool,
        )


async def read_query(
    request: Request, session: AsyncSession, asked: str | list[Term] | Uploaded, *, mixed: bool = False
) -> Query:
    """The vector that a request asks about. A combination's terms are pooled already, and pooling is linear."""
    if isinstance(asked, Uploaded):
        initialization = await request.state.initializations.resolve(asked.initialization)
        tensor = await run_in_threadpool(_read_upload, request.state.store, initialization, asked.file)
        return Query(
            label="the uploaded vector",
            pooled=tensor.mean(axis=0, dtype=np.float64).astype(np.float32),
            initialization=initialization,
            uploaded=tensor,
        )
    terms = [Term(vector=asked)] if isinstance(asked, str) else asked
    rows = await queries.resolve_versions(session, [term.vector for term in terms], pooled=True)
    check_same_initialization(rows, mixed=mixed)
    weights = np.array([term.weight for term in terms])
    pooled = weights @ pooled_of(rows).astype(np.float64)
    if not np.isfinite(pooled.astype(np.float32)).all():
        raise InvalidTensor("with these weights the combination leaves the range of float32")
    return Query(
        label=" ".join(_term(weight, row) for weight, row in zip(weights, rows, strict=True))
        if len(rows) > 1 or weights[0] != 1
        else version_reference(rows[0]),
        pooled=pooled.astype(np.float32),
        initialization=rows[0].initialization,
        others=[row.initialization for row in rows],
        versions=rows,
        weights=weights,
    )


def _term(weight: float, row: VersionRow) -> str:
    return f"{weight:+.6g} {version_reference(row)}"


def _read_upload(store: Any, initialization: InitializationRow, content: bytes) -> Float32:
    tensors = files.load(content)
    if set(tensors) not in ({"prompt"}, {"vector"}):
        raise InvalidTensor(
            f"the file holds one tensor, `prompt` (P*) or `vector` (T); this one has {sorted(tensors) or 'none'}"
        )
    ((name, values),) = tensors.items()
    tensor = as_prompt(values, name)
    shape = (initialization.num_virtual_tokens, initialization.token_dim)
    if tensor.shape != shape:
        raise InvalidTensor(
            f"the tensor is {list(tensor.shape)}, prompts of this initialization are {list(shape)}",
            expected=list(shape),
            found=list(tensor.shape),
        )
    return tensor if name == "vector" else tensor - publish.load_start(store, initialization.digest)


async def choose(
    request: Request,
    session: AsyncSession,
    query: Query,
    pool: Pool,
    *,
    allow_same_task: bool = True,
    mixed: bool = False,
) -> Candidates:
    """The candidates for a query: never itself, nor vectors of its own task or made from it, unless allowed."""
    base = await whole_pool(request, session, query, pool, mixed=mixed)
    return await leave_out(session, query, base, allow_same_task=allow_same_task)


async def whole_pool(
    request: Request, session: AsyncSession, query: Query, pool: Pool, *, mixed: bool = False
) -> Candidates:
    """What the pool says, the query too: the same for all queries of one initialization."""
    if pool.references is not None:
        return await _given(session, query, pool.references, mixed=mixed)
    return await _family(request, session, query, pool, mixed=mixed)


async def leave_out(session: AsyncSession, query: Query, base: Candidates, *, allow_same_task: bool) -> Candidates:
    """Those of the whole pool that may help the query."""
    found = await _itself_and_what_it_made(session, query, allow_same_task=allow_same_task)
    doubtful = [(reason, base.rows_of(ids)) for reason, ids in found]
    if not allow_same_task:
        doubtful.append(("the target's own task", base.of_tasks(query.tasks)))
    where, total = base.where.copy(), 0
    excluded: dict[bytes, str] = {}
    for reason, rows in doubtful:
        rows = rows[where[rows]]
        where[rows] = False
        total += len(rows)
        listed = by_age(base.ids, rows)[: LISTED - len(excluded)]
        excluded |= {bytes(base.ids[row]): reason for row in listed}
    return replace(base, where=where, excluded=excluded, excluded_total=total)


async def _given(session: AsyncSession, query: Query, references: Sequence[str], *, mixed: bool) -> Candidates:
    """Exactly these, each once, in their order. Read from Postgres: they may be of several initializations."""
    rows = list({row.id: row for row in await queries.resolve_versions(session, references, pooled=True)}.values())
    check_same_initialization([*query.versions, *rows], first=(query.label, query.initialization), mixed=mixed)
    return Candidates(
        rule=GIVEN_RULE,
        matrix=pooled_of(rows),
        ids=as_bytes(row.id for row in rows),
        tasks=[row.vector.tasks for row in rows],
        where=np.ones(len(rows), dtype=bool),
        mixed=[row.initialization for row in rows],
    )


async def _family(request: Request, session: AsyncSession, query: Query, pool: Pool, *, mixed: bool) -> Candidates:
    """Versions of the query's initialization. Raises for a request that means others', which are to be named."""
    own = query.initialization
    if mixed and all(row.id == own.id for row in query.others):
        raise Invalid(
            f"allow_mixed_initializations is for vectors that are named in candidates.references; else only those of "
            f"the query's initialization, {label(own)}, are looked at"
        )
    for other in filters.demanded_initializations(pool.filter):
        are_mixed((query.label, own), ("the filter", await request.state.initializations.resolve(other)), allowed=False)
    await release(session)  # families ask on a connection of their own; holding one meanwhile, many might wait for ever
    snapshot: Snapshot = await request.state.families.current(query.initialization)
    where = snapshot.newest if pool.versions == "newest" else snapshot.alive
    rule = _RULES.get(pool.versions, f"the not deleted version with the {pool.versions} of each vector")
    if pool.filter is not None or pool.versions.startswith("alias:"):
        statement = select(VersionRow.id).join(VersionRow.vector)
        statement = statement.where(VersionRow.initialization_id == query.initialization.id)
        if pool.versions.startswith("alias:"):
            statement = statement.where(filters.chosen(pool.versions))
        if pool.filter is not None:
            statement = statement.where(filters.condition(pool.filter))
            rule += " that passes the filter"
        passing = np.zeros(len(snapshot), dtype=bool)
        ids = await session.scalar(select(_together(statement)))
        passing[snapshot.rows_of(np.frombuffer(ids or b"", "V16"))] = True
        where = where & passing
    return Candidates(rule=rule, matrix=snapshot.matrix, ids=snapshot.records["id"], where=where, snapshot=snapshot)


async def _itself_and_what_it_made(
    session: AsyncSession, query: Query, *, allow_same_task: bool
) -> list[tuple[str, NDArray[Any]]]:
    """Reasons with the ids (m,) of 16 bytes of the versions, wherever they are, that they keep from this query."""
    itself = "the target itself" if len(query.versions) == 1 else "a term of the target"
    if allow_same_task or not query.versions:
        return [(itself, as_bytes(row.id for row in query.versions))]
    own = list({row.vector_id for row in query.versions})
    versions, made = (await session.execute(_ITS_OWN, {"own": own})).one()
    return [
        (itself, np.frombuffer(versions or b"", "V16")),
        ("made from the target", np.frombuffer(made or b"", "V16")),
    ]


_OWN = any_(bindparam("own", type_=ARRAY(Uuid())))


def _together(ids: Select[UUID]) -> ScalarSelect[bytes]:
    """Ids as one value: to read those of a hundred thousand rows one by one takes longer than to find them."""
    (found,) = ids.subquery().c
    return select(func.string_agg(func.uuid_send(found), literal(b"", LargeBinary))).scalar_subquery()


def _descendants() -> CTE:
    """Every version that was made, over any number of steps, from a version of the target's own names."""
    made = (
        select(ParentRow.version_id)
        .join(VersionRow, VersionRow.id == ParentRow.parent_id)
        .where(VersionRow.vector_id == _OWN)
        .cte("made", recursive=True)
    )
    return made.union(select(ParentRow.version_id).join(made, ParentRow.parent_id == made.c.version_id))


#: The versions of the own names of a target, and what was made from them. To compose it takes longer than to run it.
_ITS_OWN = select(
    _together(select(VersionRow.id).where(VersionRow.vector_id == _OWN)), _together(select(_descendants().c.version_id))
)


def pooled_of(rows: Sequence[VersionRow]) -> Float32:
    """Pooled vectors (n, d) of versions that were resolved with them, in their order."""
    width = rows[0].initialization.token_dim if rows else 0
    return np.array([row.pooled for row in rows], dtype=np.float32).reshape(-1, width)


#: One parameter, where `in` has one for each id.
_NAMED = (
    select(VersionRow.id, VectorRow.namespace, VectorRow.name, VersionRow.number, VectorRow.tasks, VectorRow.task_type)
    .join(VersionRow.vector)
    .where(VersionRow.id == any_(bindparam("ids", type_=ARRAY(Uuid()))))
)


async def named(session: AsyncSession, ids: Iterable[Any]) -> dict[bytes, Named]:
    """What answers show of versions, by the 16 bytes of their ids."""
    rows = await session.execute(_NAMED, {"ids": [UUID(bytes=bytes(key)) for key in ids]})
    return {
        version.bytes: Named(f"{namespace}/{name}:{number}", tasks, task_type)
        for version, namespace, name, number, tasks, task_type in rows
    }
