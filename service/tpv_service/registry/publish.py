"""How a vector or an initialization comes to be: verified, stored, then visible in one transaction.

The order is what makes a crash harmless: first the blob is durable, then the rows that point to it are committed
together. A crash between the two leaves an unreferenced blob and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any
from uuid import UUID

import numpy as np
from sqlalchemy import Select, bindparam, func, select, true, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm.attributes import set_committed_value
from uuid_utils.compat import uuid7

from tpv import files
from tpv.errors import Conflict, FingerprintMismatch, IncompatibleVectors, Invalid, InvalidTensor, VersionConflict
from tpv.schemas.initializations import BaseModelFacts, BaseModelReference
from tpv.schemas.vectors import Parent, VersionCreate
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
    """Derives T from P*, or P* from T, with P_init = `start`, all (r, d), and stores T. Blocks on the store.

    Raises InvalidTensor, or FingerprintMismatch when T is not what the sender declared, before anything is stored.
    """
    given = prompt if prompt is not None else vector
    if given is None or (prompt is not None and vector is not None):
        raise InvalidTensor("give one tensor: `prompt` (P*) or `vector` (T)")
    if given.shape != start.shape:
        raise InvalidTensor(
            f"the tensor is {list(given.shape)}, prompts of this initialization are {list(start.shape)} "
            "(num_virtual_tokens, token_dim)",
            expected=list(start.shape),
            found=list(given.shape),
        )
    with np.errstate(over="ignore"):
        difference = given - start if vector is None else given
        tuned = given if vector is None else start + given
    if not (np.isfinite(difference).all() and np.isfinite(tuned).all()):
        raise InvalidTensor("with this initialization the prompt leaves the range of float32")
    fingerprint = files.fingerprint(difference)
    if declared:
        check_declared(declared, fingerprint)
    content = files.dump({"vector": difference})
    return StoredVector(
        digest=store.put(content),
        size=len(content),
        fingerprint=fingerprint,
        prompt_fingerprint=files.fingerprint(tuned),
        reconstruction_error=float(np.abs(tuned - (start + difference)).max()),
        norm=float(np.linalg.norm(difference.astype(np.float64))),  # float32 would overflow from 1.8e19 on
        pooled=difference.mean(axis=0, dtype=np.float64).astype(np.float32),
    )


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
    vector = (
        first.on_conflict_do_update(
            index_elements=[vectors.c.namespace, vectors.c.name],
            set_={
                "last_version": vectors.c.last_version + 1,
                # What all versions share and may change: the newest registration that gives it decides.
                "description": func.coalesce(first.excluded.description, vectors.c.description),
                "tags": vectors.c.tags.concat(first.excluded.tags),
            },
        )
        .returning(*vectors.c)
        .cte("vector")
    )
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


_NEXT_VERSION = _next_version()


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
    made = metadata.model_dump(include={"method", "hyperparameters", "dataset_fingerprint"})
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
    if row.deleted_at:
        raise Conflict(f"vector {namespace}/{name} was deleted; bring it back: tpv vector restore {namespace}/{name}")
    _check_same_task(vector, metadata)
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
    reference = f"{vector.namespace}/{vector.name}:{version.number}"
    if version.deleted_at:
        raise VersionConflict(
            f"this content is {reference}, which was deleted; bring it back: tpv vector restore {reference}",
            reference=reference,
        )
    return version


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
    known = {(e.dataset, e.split, e.metric, e.value, e.seed, e.n) for e in version.evaluations}
    added = [
        EvaluationRow(version_id=version.id, job_id=job, predictions=digest, **metric.model_dump())
        for metric, digest in zip(metadata.metrics, digests, strict=True)
        if tuple(metric.model_dump().values()) not in known
    ]
    session.add_all(added)
    await session.flush()
    set_committed_value(version, "evaluations", [*version.evaluations, *added])


def _check_same_task(vector: VectorRow, metadata: VersionCreate) -> None:
    """What all versions of a vector share; a version that says otherwise belongs under another name."""
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
    resolved = []
    for parent in parents:
        row = await queries.resolve_version(session, parent.reference, deleted=deleted)
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
