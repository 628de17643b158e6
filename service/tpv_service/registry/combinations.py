"""Combinations: vectors with signed weights merged into one, registered with its terms as parents."""

from __future__ import annotations

from collections.abc import Sequence
from tempfile import TemporaryFile
from typing import Annotated

import numpy as np
from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from tpv import files, merging
from tpv.errors import Invalid
from tpv.references import Reference
from tpv.schemas.combinations import STACK_LIMIT, CombinationAnswer, CombinationCreate, CombinedTerm
from tpv.schemas.vectors import Parent, VersionCreate
from tpv.vectors import Float32
from tpv_service.auth.tokens import Actor, Allowed
from tpv_service.db import Session, release
from tpv_service.idempotency import IdempotentRequest
from tpv_service.registry import publish, queries
from tpv_service.registry.compatibility import are_mixed, label
from tpv_service.registry.publish import StoredVector
from tpv_service.registry.tables import InitializationRow, VersionRow
from tpv_service.registry.views import initialization_summary, version_reference, version_view
from tpv_service.storage import BlobStore

router = APIRouter(tags=["combinations"])
Writer = Annotated[Actor, Depends(Allowed("write"))]

_BLOCK = 2**22  #: numbers that a sum or mean holds in memory at a time, in float64


@router.post("/combinations", status_code=201, response_model=CombinationAnswer)
async def create_combination(
    request: Request, session: Session, actor: Writer, idempotency: IdempotentRequest, asked: CombinationCreate
) -> Response:
    """Registers a combination of vectors as the next version of `name`. Equal content again is a 200."""
    if kept := await idempotency.kept(session, actor.name, asked):
        return kept
    named = await request.state.initializations.resolve(asked.initialization) if asked.initialization else None
    terms = await queries.resolve_versions(session, [term.vector for term in asked.terms])
    initialization, mixed = _initialization_of_result(terms, named, asked)
    await release(session)
    digests = [term.digest for term in terms]
    stored, cosines = await run_in_threadpool(_store, request.state.store, initialization, digests, asked)
    if kept := await idempotency.begin(session, actor.name, asked):
        return kept
    taken = [
        CombinedTerm(reference=version_reference(row), fingerprint=row.fingerprint, weight=term.weight, cosine=cosine)
        for row, term, cosine in zip(terms, asked.terms, cosines, strict=True)
    ]
    output = Reference.parse(asked.name)
    row, created = await publish.publish_version(
        session,
        namespace=output.namespace,
        name=str(output.name),
        metadata=_metadata(asked, initialization, taken),
        initialization=initialization,
        stored=stored,
        actor=actor.name,
    )
    answer = CombinationAnswer.model_validate(
        {
            **dict(version_view(row, created=created)),
            "terms": taken,
            "mixed_initializations": [initialization_summary(other) for other in mixed],
        }
    )
    return await idempotency.finish(session, answer, 201 if created else 200)


def _initialization_of_result(
    terms: Sequence[VersionRow], named: InitializationRow | None, asked: CombinationCreate
) -> tuple[InitializationRow, list[InitializationRow]]:
    """The result's initialization, and the others that the terms have; raises IncompatibleVectors or Invalid."""
    one = ("the result", named) if named else (version_reference(terms[0]), terms[0].initialization)
    others = {
        row.initialization_id: row.initialization
        for row in terms
        if are_mixed(one, (version_reference(row), row.initialization), allowed=asked.allow_mixed_initializations)
    }
    if others and named is None:
        found = ", ".join(map(label, (one[1], *others.values())))
        raise Invalid(f"the terms belong to several initializations ({found}); name the result's: initialization")
    return one[1], list(others.values())


def _metadata(
    asked: CombinationCreate, initialization: InitializationRow, terms: Sequence[CombinedTerm]
) -> VersionCreate:
    """What the version keeps: its terms as parents, and the recipe as hyperparameters."""
    return VersionCreate(
        initialization=initialization.fingerprint,
        task=asked.task,
        task_type=asked.task_type,
        description=asked.description,
        tags=asked.tags,
        method=f"combination:{asked.method}",
        hyperparameters={
            "terms": [{"vector": term.reference, "weight": term.weight} for term in terms],
            **asked.options,
        },
        parents=[Parent(reference=t.reference, fingerprint=t.fingerprint, role="term", weight=t.weight) for t in terms],
    )


def _store(
    store: BlobStore, initialization: InitializationRow, digests: Sequence[str], asked: CombinationCreate
) -> tuple[StoredVector, list[float | None]]:
    """The result, stored, and each term's cosine to it. The terms wait in a temporary file, not in memory."""
    shape = (len(digests), initialization.num_virtual_tokens, initialization.token_dim)
    with TemporaryFile() as file:
        stack = np.memmap(file, np.float32, "w+", shape=shape)
        for i, digest in enumerate(digests):
            stack[i] = files.load(store.get(digest))["vector"]
        result = _merge(stack, asked)
        cosines = [_cosine(tensor, result) for tensor in stack]
    start = publish.load_start(store, initialization.digest)
    return publish.store_vector(store, start=start, vector=result), cosines


def _merge(stack: Float32, asked: CombinationCreate) -> Float32:
    n, r, d = stack.shape
    if asked.method in ("sum", "mean"):
        rows = max(1, _BLOCK // (n * d))  # each number of the result depends on its own place alone
    elif stack.size <= STACK_LIMIT:
        rows = r
    else:
        raise Invalid(
            f"{asked.method} holds all terms in memory: {n} of {r} x {d} are {stack.size} numbers, more than "
            f"{STACK_LIMIT}; use sum or mean, or fewer terms"
        )
    weights = [term.weight for term in asked.terms]
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused
            return np.concatenate(
                [
                    merging.merge(stack[:, i : i + rows], weights, asked.method, **asked.options)
                    for i in range(0, r, rows)
                ]
            )
    except ValueError as error:
        raise Invalid(str(error)) from error


def _cosine(one: Float32, other: Float32) -> float | None:
    a, b = one.ravel().astype(np.float64), other.ravel().astype(np.float64)
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norms if norms else None
