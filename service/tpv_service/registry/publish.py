"""How a vector or an initialization comes to be: verified, stored, then visible in one transaction.

The order is what makes a crash harmless: first the blob is durable, then the rows that point to it are committed
together. A crash between the two leaves an unreferenced blob and nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any
from uuid import UUID

import numpy as np
from pgvector import Vector
from psycopg import AsyncConnection
from psycopg.types.json import Jsonb
from psycopg.types.numeric import Int4
from sqlalchemy import Integer, Row, Select, TableValuedAlias, Text, Uuid, bindparam, column, func, select, true, update
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, Insert, insert
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import joinedload
from sqlalchemy.orm.attributes import set_committed_value
from sqlalchemy.sql.dml import ReturningInsert
from sqlalchemy.types import TypeEngine
from uuid_utils.compat import uuid7

from tpv import files
from tpv.errors import (
    Conflict,
    FingerprintMismatch,
    IncompatibleVectors,
    Invalid,
    InvalidTensor,
    ProblemError,
    VersionConflict,
)
from tpv.schemas.bulk import BulkItem, Registered
from tpv.schemas.initializations import BaseModelFacts, BaseModelReference
from tpv.schemas.vectors import EvaluationCreate, Parent, VersionCreate, VersionMetadata
from tpv.vectors import Float32, as_prompt
from tpv_service.db import Table
from tpv_service.registry import queries
from tpv_service.registry.tables import (
    BaseModelRow,
    EvaluationRow,
    InitializationRow,
    ParentRow,
    VectorRow,
    VersionRow,
)
from tpv_service.storage import BlobStore


@dataclass(frozen=True, kw_only=True)
class StoredVector:
    """A T whose blob is durable, with all that is derived from it once."""

    digest: str
    size: int
    fingerprint: str
    prompt_fingerprint: str
    reconstruction_error: float
    norm: float
    pooled: Float32  #: (d,)


@lru_cache(maxsize=32)
def load_start(store: BlobStore, digest: str) -> Float32:
    """P_init (r, d) of this digest, verified. Kept in memory: many vectors share one, and its content never changes."""
    return as_prompt(files.load(store.get(digest))["prompt"], "initialization")


def store_vector(
    store: BlobStore,
    *,
    start: Float32,
    prompt: Float32 | None = None,
    vector: Float32 | None = None,
    declared: str | None = None,
) -> StoredVector:
    """`store_vectors` for one P* or T, (r, d)."""
    (stored,) = store_vectors(
        store,
        start=start,
        prompts=None if prompt is None else prompt[np.newaxis],
        vectors=None if vector is None else vector[np.newaxis],
        declared=[declared],
    )
    return stored


def store_vectors(
    store: BlobStore,
    *,
    start: Float32,
    prompts: Float32 | None = None,
    vectors: Float32 | None = None,
    declared: Sequence[str | None],
    names: Sequence[str] | None = None,
) -> list[StoredVector]:
    """Derives T from P*, or P* from T, (n, r, d), with P_init = `start`, (r, d), and stores each T. Blocks on that.

    Raises InvalidTensor, or FingerprintMismatch when a T is not what the sender declared, before anything is stored;
    where there are `names`, the error tells whose it is.
    """
    given = prompts if prompts is not None else vectors
    if given is None or (prompts is not None and vectors is not None):
        raise InvalidTensor("give one tensor: `prompt` (P*) or `vector` (T)")
    if given.shape[1:] != start.shape:
        raise InvalidTensor(
            f"the tensor is {list(given.shape[1:])}, prompts of this initialization are {list(start.shape)} "
            "(num_virtual_tokens, token_dim)",
            expected=list(start.shape),
            found=list(given.shape[1:]),
        )
    with np.errstate(over="ignore"):
        differences = given - start if vectors is None else given
        tuned = given if vectors is None else start + given
    finite = np.isfinite(differences).all(axis=(1, 2)) & np.isfinite(tuned).all(axis=(1, 2))
    for i in np.flatnonzero(~finite)[:1]:
        with of_item(i, names):
            raise InvalidTensor("with this initialization the prompt leaves the range of float32")
    fingerprints = [files.fingerprint(difference) for difference in differences]
    for i, (expected, found) in enumerate(zip(declared, fingerprints, strict=True)):
        if expected:
            with of_item(i, names):
                check_declared(expected, found)
    header = files.header({"vector": start.shape})
    contents = [header + difference.astype("<f4", copy=False).tobytes() for difference in differences]
    with ThreadPoolExecutor(1) as writer:  # a disk takes as long as all of this
        digests = writer.submit(store.put_many, contents)
        prompt_fingerprints = [files.fingerprint(prompt) for prompt in tuned]
        errors = np.abs(tuned - (start + differences)).max(axis=(1, 2)).tolist()
        weights = differences.reshape(len(differences), -1).astype(np.float64)  # float32 would overflow from 1.8e19 on
        # No product: BLAS would take threads for it, which then spin for longer than everything else here takes.
        norms = np.sqrt(np.square(weights, out=weights).sum(axis=1)).tolist()
        pooled = differences.mean(axis=1, dtype=np.float64).astype(np.float32)
    return [
        StoredVector(
            digest=digest,
            size=len(content),
            fingerprint=fingerprint,
            prompt_fingerprint=prompt_fingerprint,
            reconstruction_error=error,
            norm=norm,
            pooled=mean,
        )
        for digest, content, fingerprint, prompt_fingerprint, error, norm, mean in zip(
            digests.result(), contents, fingerprints, prompt_fingerprints, errors, norms, pooled, strict=True
        )
    ]


@contextmanager
def of_item(index: int, names: Sequence[str] | None) -> Iterator[None]:
    """Lets an error tell which of many items it is about."""
    try:
        yield
    except ProblemError as error:
        if names is None:
            raise
        place = {"index": int(index), "name": names[index]}
        raise type(error)(f"item {index} ({names[index]}): {error.detail}", **error.extra, **place) from error


_VECTOR = tuple(column.key for column in Table.metadata.tables["vectors"].c)
_STORED = tuple(field.name for field in fields(StoredVector))


def _next_version() -> Select[Any]:
    """One statement that takes the next number of a name and makes the version; `made_at` is null when it exists.

    The row lock on the vector is the queue of writers; a rollback gives the number back. Built once: composing it
    for every request would take longer than Postgres does.
    """
    vectors, versions = Table.metadata.tables["vectors"], Table.metadata.tables["versions"]
    shared = ("namespace", "name", "tasks", "task_type", "description", "tags", "actor")
    first = insert(vectors).values(
        id=bindparam("vector"), last_version=1, **{column: bindparam(column) for column in shared}
    )
    vector = _or_count_up(first).cte("vector")
    columns = [c for c in versions.c if c.key not in ("vector_id", "number", "created_at", "deleted_at", "txid")]
    made = (
        insert(versions)
        .from_select(
            ["vector_id", "number", *(column.key for column in columns)],
            select(vector.c.id, vector.c.last_version, *(bindparam(c.key, type_=c.type) for c in columns)),
        )
        .on_conflict_do_nothing(index_elements=["vector_id", "fingerprint", "initialization_id"])
        .returning(versions.c.created_at)
        .cte("made")
    )
    return select(vector, made.c.created_at.label("made_at")).outerjoin_from(vector, made, true())


def _or_count_up(first: Insert) -> ReturningInsert[Any]:
    """Vectors to be inserted, with as many numbers taken as `last_version` says; of those there are, the next ones."""
    vectors = Table.metadata.tables["vectors"]
    return first.on_conflict_do_update(
        index_elements=[vectors.c.namespace, vectors.c.name],
        set_={
            "last_version": vectors.c.last_version + first.excluded.last_version,
            # What all versions share and may change: the newest registration that gives it decides.
            "description": func.coalesce(first.excluded.description, vectors.c.description),
            "tags": vectors.c.tags.concat(first.excluded.tags),
        },
    ).returning(*vectors.c)


_NEXT_VERSION = _next_version()
_MADE = ("method", "hyperparameters", "dataset_fingerprint")  #: a version's own metadata, which never change


async def publish_version(
    session: AsyncSession,
    *,
    namespace: str,
    name: str,
    metadata: VersionCreate,
    initialization: InitializationRow,
    stored: StoredVector,
    actor: str,
    job: UUID | None = None,
    predictions: Sequence[str | None] = (),
    state: str | None = None,
) -> tuple[VersionRow, bool]:
    """Makes the next version, or finds the one that has this content already; gives it and whether it was made.

    Raises VersionConflict when the content is there with other immutable metadata or was deleted, and Conflict when
    the whole vector was deleted. Writers of one name take turns on the vector's row, so numbers have no gap.
    """
    # A job may end after one of its sources was deleted: what it was made from stays true.
    parents = await _resolve_parents(session, metadata.parents, deleted=job is not None)
    made = {key: getattr(metadata, key) for key in _MADE}
    new = {
        "id": uuid7(),
        "initialization_id": initialization.id,
        **{key: getattr(stored, key) for key in _STORED},
        **made,
        "state": state,
        "provenance": metadata.provenance,
        "job_id": job,
        "actor": actor,
    }
    shared = {
        "vector": uuid7(),
        "namespace": namespace,
        "name": name,
        "tasks": metadata.task,
        "task_type": metadata.task_type,
        "description": metadata.description,
        "tags": metadata.tags,
    }
    row = (await session.execute(_NEXT_VERSION, new | shared)).one()
    vector = VectorRow(**{column: getattr(row, column) for column in _VECTOR})
    _check_takes(vector, metadata)
    if row.made_at is None:
        found = await _existing(session, vector, initialization, stored)
        if job is None:  # a job has found out what it was asked to find out, whatever its options were
            _check_same_metadata(found, made, parents)
        await _add_evaluations(session, found, metadata, predictions, job)
        return found, False
    version = VersionRow(**new, vector_id=vector.id, number=vector.last_version, created_at=row.made_at)
    edges = [ParentRow(version_id=version.id, position=i, **parent) for i, parent in enumerate(parents)]
    session.add_all(edges)
    # All that belongs to a new version is known here; asking the database for it again would double its work.
    related = {
        "vector": vector,
        "initialization": initialization,
        "aliases": [],
        "parents": edges,
        "evaluations": [],
    }
    for attribute, value in related.items():
        set_committed_value(version, attribute, value)
    await _add_evaluations(session, version, metadata, predictions, job)
    return version, True


async def publish_versions(
    session: AsyncSession,
    *,
    items: Sequence[BulkItem],
    initialization: InitializationRow,
    stored: Sequence[StoredVector],
    actor: str,
) -> list[Registered]:
    """What `publish_version` for one item after the other comes to, by a handful of statements in all.

    Raises the error of the first item that has one. Vectors are locked in the order of their names, so two of these
    cannot wait for each other.
    """
    names = [item.name for item in items]
    vectors, numbers = await _take_numbers(session, items, stored, actor)
    contents = {(vectors[name].id, blob.fingerprint) for name, blob in zip(names, stored, strict=True)}
    found = await _versions_with(session, contents, initialization)
    figures = await _figures_of(session, [version.id for version in found.values()])
    known = {content: (version.id, version.number) for content, version in found.items()}
    given_back = Counter(vector for vector, _ in found)
    new: dict[tuple[UUID, str], dict[str, Any]] = {}
    evaluations: list[dict[str, Any]] = []
    answer = []
    for i, (item, blob) in enumerate(zip(items, stored, strict=True)):
        vector, made = vectors[item.name], {key: getattr(item, key) for key in _MADE}
        content = vector.id, blob.fingerprint
        with of_item(i, names):
            _check_takes(vector, item)
            if created := content not in known:
                known[content] = version_id, number = uuid7(), next(numbers[vector.id])
                new[content] = {
                    "id": version_id,
                    "vector_id": vector.id,
                    "number": number,
                    "initialization_id": initialization.id,
                    **{key: getattr(blob, key) for key in _STORED},
                    **made,
                    "provenance": item.provenance,
                    "actor": actor,
                }
            elif content in new:
                version = VersionRow(**new[content])
                set_committed_value(version, "vector", VectorRow(**vector._mapping))
                _check_same_metadata(version, made, ())
            else:
                _check_not_deleted(found[content])
                _check_same_metadata(found[content], made, ())
        version_id, number = known[content]
        measured = figures.setdefault(version_id, set())
        added = [metric for metric in item.metrics if _figure(metric) not in measured]
        measured.update(map(_figure, added))
        evaluations += ({"version_id": version_id, **metric.model_dump()} for metric in added)
        answer.append(
            Registered(
                namespace=vector.namespace,
                name=vector.name,
                version=number,
                fingerprint=blob.fingerprint,
                created=created,
            )
        )
    await _give_back(session, given_back)
    await _copy_versions(session, new.values())
    if evaluations:
        await session.execute(insert(EvaluationRow), evaluations)
    return answer


async def _take_numbers(
    session: AsyncSession, items: Sequence[BulkItem], stored: Sequence[StoredVector], actor: str
) -> tuple[dict[str, Row[Any]], dict[UUID, Iterator[int]]]:
    """The items' vectors by name, locked; and for each by its id as many next numbers as it is given contents."""
    contents: dict[str, set[str]] = {}
    asked: dict[str, dict[str, Any]] = {}
    for item, blob in zip(items, stored, strict=True):
        namespace, name = item.name.split("/")
        first = {"namespace": namespace, "name": name, "tasks": item.task, "task_type": item.task_type, "actor": actor}
        vector = asked.setdefault(item.name, {**first, "id": str(uuid7()), "description": None, "tags": {}})
        vector["description"] = item.description if item.description is not None else vector["description"]
        vector["tags"] = {**vector["tags"], **item.tags}
        contents.setdefault(item.name, set()).add(blob.fingerprint)
        vector["last_version"] = len(contents[item.name])
    rows = (await session.execute(_TAKE_NUMBERS, {"asked": list(asked.values())})).all()
    vectors = {f"{row.namespace}/{row.name}": row for row in rows}
    numbers = {
        vector.id: iter(range(vector.last_version - asked[path]["last_version"] + 1, vector.last_version + 1))
        for path, vector in vectors.items()
    }
    return vectors, numbers


def _take_numbers_of_many() -> ReturningInsert[Any]:
    """`_or_count_up` for vectors given as a JSON list, in the order of their names."""
    vectors = Table.metadata.tables["vectors"]
    columns = [c for c in vectors.c if c.key not in ("created_at", "deleted_at")]
    asked = (
        func.jsonb_to_recordset(bindparam("asked", type_=JSONB))
        .table_valued(*(column(c.key, c.type) for c in columns), name="asked")
        .render_derived(with_types=True)
    )
    rows = select(*asked.c).order_by(asked.c.namespace.collate("C"), asked.c.name.collate("C"))
    return _or_count_up(insert(vectors).from_select([c.key for c in columns], rows))


_TAKE_NUMBERS = _take_numbers_of_many()


async def _versions_with(
    session: AsyncSession, contents: Collection[tuple[UUID, str]], initialization: InitializationRow
) -> dict[tuple[UUID, str], VersionRow]:
    """The versions, deleted ones too, that have one of these contents: (id of the vector, fingerprint of T)."""
    asked = _columns(vector=Uuid(), fingerprint=Text())
    rows = await session.scalars(
        select(VersionRow)
        .join(asked, (VersionRow.vector_id == asked.c.vector) & (VersionRow.fingerprint == asked.c.fingerprint))
        .where(VersionRow.initialization_id == initialization.id)
        .options(joinedload(VersionRow.vector, innerjoin=True)),
        dict(zip(("vector", "fingerprint"), map(list, zip(*contents, strict=True)), strict=True)),
    )
    return {(row.vector_id, row.fingerprint): row for row in rows}


async def _figures_of(session: AsyncSession, versions: Sequence[UUID]) -> dict[UUID, set[tuple[Any, ...]]]:
    """What was measured of each of these versions, as `_figure` tells it."""
    figures: dict[UUID, set[tuple[Any, ...]]] = {}
    if versions:
        for row in await session.scalars(select(EvaluationRow).where(EvaluationRow.version_id.in_(versions))):
            assert row.version_id is not None  # one of those asked for
            figures.setdefault(row.version_id, set()).add(_figure(row))
    return figures


async def _give_back(session: AsyncSession, numbers: Mapping[UUID, int]) -> None:
    """Takes back the numbers that vectors, by id, have not needed."""
    if numbers:
        vectors, unneeded = Table.metadata.tables["vectors"], _columns(vector=Uuid(), count=Integer())
        await session.execute(
            update(vectors)
            .where(vectors.c.id == unneeded.c.vector)
            .values(last_version=vectors.c.last_version - unneeded.c["count"]),
            {"vector": list(numbers), "count": list(numbers.values())},
        )


def _columns(**types: TypeEngine[Any]) -> TableValuedAlias:
    """A table whose columns are given as one array each."""
    arrays = (bindparam(name, type_=ARRAY(type_)) for name, type_ in types.items())
    columns = (column(name, type_) for name, type_ in types.items())
    return func.unnest(*arrays).table_valued(*columns).render_derived()


_COPIED = ("id", "vector_id", "number", "initialization_id", *_STORED, *_MADE, "provenance", "actor")
_COPY = f"copy versions ({', '.join(_COPIED)}) from stdin (format binary)"


async def _copy_versions(session: AsyncSession, rows: Iterable[dict[str, Any]]) -> None:
    """Inserts versions, given as values of `_COPIED`. By COPY, for an array of pooled vectors has no binary form."""
    connection = (await (await session.connection()).get_raw_connection()).driver_connection
    assert isinstance(connection, AsyncConnection)
    async with connection.cursor() as cursor, cursor.copy(_COPY) as copy:
        for row in rows:
            await copy.write_row([_binary(row[key]) for key in _COPIED])


def _binary(value: Any) -> Any:
    """A value as its column's type; COPY converts nothing."""
    match value:
        case int():
            return Int4(value)
        case dict():
            return Jsonb(value)
        case np.ndarray():
            return Vector(value)
    return value


async def _existing(
    session: AsyncSession,
    vector: VectorRow,
    initialization: InitializationRow,
    stored: StoredVector,
) -> VersionRow:
    """The version that has this content already; the number taken above is given back."""
    await session.execute(
        update(VectorRow).where(VectorRow.id == vector.id).values(last_version=VectorRow.last_version - 1)
    )
    version = (
        await session.execute(
            queries.full_version().where(
                VersionRow.vector_id == vector.id,
                VersionRow.fingerprint == stored.fingerprint,
                VersionRow.initialization_id == initialization.id,
            )
        )
    ).scalar_one()
    _check_not_deleted(version)
    return version


def _check_not_deleted(version: VersionRow) -> None:
    """Raises VersionConflict when the version that has the content was deleted."""
    reference = f"{version.vector.namespace}/{version.vector.name}:{version.number}"
    if version.deleted_at:
        raise VersionConflict(
            f"this content is {reference}, which was deleted; bring it back: tpv vector restore {reference}",
            reference=reference,
        )


def _check_same_metadata(version: VersionRow, values: dict[str, Any], parents: Sequence[dict[str, Any]]) -> None:
    """Raises VersionConflict when a version that has the content already was made otherwise."""
    reference = f"{version.vector.namespace}/{version.vector.name}:{version.number}"
    there = {key: getattr(version, key) for key in values}
    differences: dict[str, Any] = {
        key: [there[key], values[key]] for key in values if values[key] and values[key] != there[key]
    }
    if parents and [p["parent_id"] for p in parents] != [p.parent_id for p in version.parents]:
        differences["parents"] = [[p.reference for p in version.parents], [p["reference"] for p in parents]]
    if differences:
        raise VersionConflict(
            f"this content is {reference} already, with another {', '.join(differences)}; versions never change: "
            "register it under another name, or leave these out",
            reference=reference,
            differences=differences,
        )


async def _add_evaluations(
    session: AsyncSession,
    version: VersionRow,
    metadata: VersionCreate,
    predictions: Sequence[str | None],
    job: UUID | None,
) -> None:
    """Adds the figures that the version does not have yet."""
    digests = [*predictions, *([None] * (len(metadata.metrics) - len(predictions)))]
    known = {_figure(evaluation) for evaluation in version.evaluations}
    added = [
        EvaluationRow(version_id=version.id, job_id=job, predictions=digest, **metric.model_dump())
        for metric, digest in zip(metadata.metrics, digests, strict=True)
        if _figure(metric) not in known
    ]
    session.add_all(added)
    await session.flush()
    set_committed_value(version, "evaluations", [*version.evaluations, *added])


def _figure(evaluation: EvaluationRow | EvaluationCreate) -> tuple[Any, ...]:
    """What makes an evaluation the same as another one of its version."""
    return tuple(getattr(evaluation, key) for key in EvaluationCreate.model_fields)


def _check_takes(vector: VectorRow | Row[Any], metadata: VersionMetadata) -> None:
    """Raises Conflict when the vector was deleted, and VersionConflict when its versions are about another task."""
    if vector.deleted_at:
        path = f"{vector.namespace}/{vector.name}"
        raise Conflict(f"vector {path} was deleted; bring it back: tpv vector restore {path}")
    differences: dict[str, Any] = {}
    if metadata.task and metadata.task != vector.tasks:
        differences["task"] = [vector.tasks, metadata.task]
    if metadata.task_type and metadata.task_type != vector.task_type:
        differences["task_type"] = [vector.task_type, metadata.task_type]
    if differences:
        raise VersionConflict(
            f"{vector.namespace}/{vector.name} has another {' and '.join(differences)}; use another name",
            differences=differences,
        )


async def _resolve_parents(session: AsyncSession, parents: Sequence[Parent], *, deleted: bool) -> list[dict[str, Any]]:
    if not parents:
        return []
    references = [parent.reference for parent in parents]
    rows = (
        [await queries.resolve_version(session, reference, deleted=True) for reference in references]
        if deleted
        else await queries.resolve_versions(session, references)
    )
    resolved = []
    for parent, row in zip(parents, rows, strict=True):
        if parent.fingerprint:
            check_declared(parent.fingerprint, row.fingerprint)
        resolved.append(
            {
                "parent_id": row.id,
                "reference": f"{row.vector.namespace}/{row.vector.name}:{row.number}",
                "fingerprint": row.fingerprint,
                "role": parent.role,
                "weight": parent.weight,
            }
        )
    return resolved


def check_declared(declared: str, found: str) -> None:
    """Raises FingerprintMismatch when what arrived is not what the sender declared."""
    if declared != found:
        raise FingerprintMismatch(
            f"the request declares {declared}, what arrived is {found}", declared=declared, found=found
        )


async def publish_initialization(
    session: AsyncSession,
    *,
    namespace: str,
    name: str | None,
    base_model: BaseModelReference,
    facts: BaseModelFacts,
    strategy: str,
    parameters: dict[str, Any],
    tensor: Float32,
    digest: str,
    size: int,
    actor: str,
) -> tuple[InitializationRow, bool]:
    """Makes the initialization whose blob `digest` is durable, or finds it: one tensor of one base model is one row.

    Raises Conflict when the name belongs to another tensor, or the tensor is known under another name.
    """
    model = await ensure_base_model(session, base_model, facts)
    num_virtual_tokens, token_dim = tensor.shape
    if model.token_dim not in (None, token_dim):
        raise IncompatibleVectors(
            f"the tensor is {token_dim} wide, the input embeddings of {model.name} are {model.token_dim}",
            differences={"token_dim": [model.token_dim, token_dim]},
        )
    fingerprint = files.fingerprint(tensor)
    made = (
        await session.execute(
            insert(InitializationRow)
            .values(
                namespace=namespace,
                name=name,
                base_model_id=model.id,
                num_virtual_tokens=num_virtual_tokens,
                token_dim=token_dim,
                strategy=strategy,
                parameters=parameters,
                fingerprint=fingerprint,
                digest=digest,
                size=size,
                actor=actor,
            )
            .on_conflict_do_nothing()
            .returning(InitializationRow.id)
        )
    ).scalar_one_or_none()
    row = (
        await session.execute(
            queries.full_initialization().where(
                InitializationRow.base_model_id == model.id, InitializationRow.fingerprint == fingerprint
            )
        )
    ).scalar_one_or_none()
    if row is None:
        raise Conflict(
            f"the name {namespace}/{name} belongs to another initialization; names are permanent, choose another",
        )
    if name and (row.namespace, row.name) != (namespace, name):
        known = f"{row.namespace}/{row.name}" if row.name else str(row.id)
        raise Conflict(f"this tensor is known as {known} already; use that", reference=known)
    return row, made is not None


async def ensure_base_model(
    session: AsyncSession, reference: BaseModelReference, facts: BaseModelFacts
) -> BaseModelRow:
    """The row of a base model: by its digest where it is known, else by name and commit.

    Raises Invalid for a hub id without a commit, unless that is asked for.
    """
    if not (reference.revision or reference.unpinned or facts.digest):
        raise Invalid(
            f"base model {reference.id!r} needs a revision (a commit, which never changes); to take whatever is there "
            "now, say unpinned: true"
        )
    where = (
        [BaseModelRow.digest == facts.digest]
        if facts.digest
        else [
            BaseModelRow.digest.is_(None),
            BaseModelRow.name == reference.id,
            BaseModelRow.revision.is_not_distinct_from(reference.revision),
        ]
    )
    found = select(BaseModelRow).where(*where).order_by(BaseModelRow.id).limit(1)
    if row := await session.scalar(found):
        _check_same_model(row, facts)
        return row
    await session.execute(
        insert(BaseModelRow)
        .values(name=reference.id, revision=reference.revision, unpinned=reference.unpinned, **facts.model_dump())
        .on_conflict_do_nothing()
    )
    row = await session.scalar(found)
    assert row is not None  # made by us or by somebody faster
    _check_same_model(row, facts)
    return row


def _check_same_model(row: BaseModelRow, facts: BaseModelFacts) -> None:
    """Raises Conflict when something else is known of the model with this digest."""
    given = facts.model_dump(exclude_none=True)
    if different := {name: [getattr(row, name), value] for name, value in given.items() if getattr(row, name) != value}:
        raise Conflict(
            f"base model {row.name} is known with another {', '.join(different)}; read these off the model itself",
            differences=different,
        )
