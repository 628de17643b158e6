"""Similarities of one query to many candidates, in blocks, and the best of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import numpy as np
from fastapi import Request
from numpy.typing import NDArray
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.concurrency import run_in_threadpool

from tpv import files
from tpv.errors import Invalid
from tpv.schemas.similarity import Pool, ReferencePool
from tpv.similarity import Metric, pooled_similarity, similarity
from tpv_service.db import release
from tpv_service.registry import publish
from tpv_service.registry.compatibility import label
from tpv_service.registry.tables import InitializationRow, VersionRow
from tpv_service.search.family import Float32, Mask, Rows, by_age
from tpv_service.search.queries import Candidates, Query, choose
from tpv_service.storage import BlobStore

CENTRE_LEAST = 10  #: vectors of a reference pool; centred on n of their own, n vectors have a mean cosine of -1/(n-1)
TIES = 1_000  #: with equal similarities, that rank by reference; more rank by age, for their names are not asked for
_BLOCK = 8192  #: rows; what is computed on the way to a similarity stays in the processor's cache


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A metric with what it needs beside the two vectors."""

    metric: Metric
    center: Float32 | None = None  #: (d,), the mean of the reference pool
    reference_pool: ReferencePool | None = None
    initialization: Float32 | None = None  #: (d,), the pooled P_init

    def one_with_many(self, query: Float32, matrix: Float32, where: Mask) -> NDArray[np.float32]:
        """Similarities (n,) of a pooled vector (d,) to those rows of a matrix (n, d); -inf for the others."""
        result = np.full(len(matrix), -np.inf, dtype=np.float32)
        count = int(np.count_nonzero(where))
        if 2 * count > len(matrix):  # reading all in their order is quicker than picking these
            for start in range(0, len(matrix), _BLOCK):
                result[start : start + _BLOCK] = self.compare(matrix[start : start + _BLOCK], query)
            result[~where] = -np.inf
        else:
            rows = np.flatnonzero(where)
            for start in range(0, count, _BLOCK):
                some = rows[start : start + _BLOCK]
                result[some] = self.compare(matrix[some], query)
        _check_finite(result, count, self.metric)
        return result

    def many_with_many(self, a: Float32, b: Float32) -> NDArray[np.float32]:
        """Similarities (n, m) of pooled vectors (n, d) and (m, d)."""
        result = self.compare(a, b)
        _check_finite(result, result.size, self.metric)
        return result

    def compare(self, a: Float32, b: Float32) -> NDArray[np.float32]:
        with np.errstate(over="ignore", invalid="ignore"):  # checked afterwards
            result: NDArray[np.float32] = pooled_similarity(
                a, b, self.metric, center=self.center, initialization=self.initialization
            )
        return result


def _check_finite(similarities: NDArray[np.float32], count: int, metric: str) -> None:
    if np.count_nonzero(np.isfinite(similarities)) != count:
        raise Invalid(
            f"{metric}: products of these vectors leave the range of float32; leave out the ones with the largest "
            "norm, or register them scaled down"
        )


async def measure(
    request: Request,
    session: AsyncSession,
    metric: Metric,
    query: Query,
    reference_pool: Pool | None,
    others: Iterable[InitializationRow] = (),
) -> Measure:
    """The metric for a query; asks for the reference pool of a centred one and for the P_init that prompts begin at.

    `others` are the initializations of what the query is compared with. Raises Invalid for a centred metric if they
    are not the query's: the mean of one family says nothing of another.
    """
    if metric == "cosine-prompt":
        (start,) = await starts(request, [query.initialization])
        return Measure(metric=metric, initialization=start)
    if not metric.endswith("-centered"):
        return Measure(metric=metric)
    if strangers := {label(row) for row in others if row.id != query.initialization.id}:
        raise Invalid(
            f"{metric} subtracts the mean of vectors of {label(query.initialization)}, which means nothing to those of "
            f"{', '.join(sorted(strangers))}; take {metric.removesuffix('-centered')}, or leave them out"
        )
    pool = await choose(request, session, query, reference_pool or Pool())
    await release(session)
    center = await center_of(pool, metric)
    return Measure(metric=metric, center=center, reference_pool=ReferencePool(rule=pool.rule, size=pool.size))


async def starts(request: Request, initializations: Sequence[InitializationRow]) -> Float32:
    """The pooled P_init (n, d) of each: what mixed initializations need to be compared by `cosine-prompt`."""

    def load() -> Float32:
        store: BlobStore = request.state.store
        pooled = {
            digest: publish.load_start(store, digest).mean(axis=0, dtype=np.float64)
            for digest in {row.digest for row in initializations}
        }
        return np.array([pooled[row.digest] for row in initializations], dtype=np.float32)

    return await run_in_threadpool(load)


async def center_of(pool: Candidates, asked: str) -> Float32:
    """The mean (d,) of a reference pool; raises Invalid, naming what was `asked`, for one too small to centre on."""
    if pool.size < CENTRE_LEAST:
        raise Invalid(
            f"{asked}: the reference pool has {pool.size} vectors without the query, at least {CENTRE_LEAST} are "
            "needed, for few vectors are pushed apart by centring alone; name a larger reference_pool, or leave "
            "centring out"
        )
    return await run_in_threadpool(_mean, pool)


def _mean(pool: Candidates) -> Float32:
    """The mean (d,) of the candidates."""
    if pool.snapshot is not None and len(few := np.flatnonzero(pool.snapshot.newest != pool.where)) < 100:
        total, count = pool.snapshot.total  # of the newest; the query's own vector, for instance, is left out of them
        signs = np.where(pool.where[few], 1.0, -1.0)
        mean = (total + signs @ pool.matrix[few].astype(np.float64)) / (count + signs.sum())
        return np.asarray(mean, dtype=np.float32)
    total, count = np.zeros(pool.matrix.shape[1]), pool.size
    for start in range(0, len(pool.matrix), _BLOCK):
        block = pool.matrix[start : start + _BLOCK][pool.where[start : start + _BLOCK]]
        total += block.sum(axis=0, dtype=np.float64)
    return np.asarray(total / count, dtype=np.float32)


def best(similarities: NDArray[np.float32], where: Mask, ids: NDArray[Any], k: int) -> Rows:
    """The rows of the k largest similarities, k <= TIES, and last all that equal the k-th; of many, the TIES oldest."""
    rows = np.flatnonzero(where)
    if len(rows) <= k:
        return rows
    values = similarities[rows]
    least = np.partition(values, len(rows) - k)[len(rows) - k]
    equal = rows[values == least]
    return np.concatenate([rows[values > least], equal if len(equal) <= TIES else by_age(ids, equal)[:TIES]])


def tied(similarities: NDArray[np.float32], where: Mask) -> Rows:
    """The rows whose similarity another candidate has too."""
    rows: Rows = np.flatnonzero(where)
    rows = rows[np.argsort(similarities[rows])]
    equal = similarities[rows[1:]] == similarities[rows[:-1]]
    shared = np.zeros(len(rows), dtype=bool)
    shared[1:] = equal
    shared[:-1] |= equal
    return rows[shared]


async def flat_similarities(
    request: Request, session: AsyncSession, query: Query, ids: Sequence[UUID]
) -> NDArray[np.float32]:
    """`cosine-flat` of the query with these versions, whose files are read whole, one at a time."""
    found = await session.execute(select(VersionRow.id, VersionRow.digest).where(VersionRow.id.in_(ids)))
    digests = dict(found.all())
    await release(session)
    store: BlobStore = request.state.store

    def compare() -> NDArray[np.float32]:
        whole = _whole(store, query)
        vectors = (_load(store, digests[version]) for version in ids)
        return np.fromiter((similarity(vector, whole, "cosine-flat") for vector in vectors), np.float32, len(ids))

    return await run_in_threadpool(compare)


async def flat_matrix(request: Request, rows: Sequence[VersionRow]) -> NDArray[np.float32]:
    """`cosine-flat` of all pairs (n, n)."""
    store: BlobStore = request.state.store

    def compare() -> NDArray[np.float32]:
        vectors = np.stack([_load(store, row.digest) for row in rows])
        return np.asarray(similarity(vectors, vectors, "cosine-flat"))

    return await run_in_threadpool(compare)


def _whole(store: BlobStore, query: Query) -> Float32:
    """The query's own tensor (r, d)."""
    if query.uploaded is not None:
        return query.uploaded
    shape = (query.initialization.num_virtual_tokens, query.initialization.token_dim)
    total = np.zeros(shape)
    for weight, row in zip(query.weights, query.versions, strict=True):
        total += weight * _load(store, row.digest)
    return total.astype(np.float32)


def _load(store: BlobStore, digest: str) -> Float32:
    return files.load(store.get(digest))["vector"]
