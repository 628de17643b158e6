"""The best of a large family without comparing all of it, and exactly the best.

What tells vectors of a family apart lies mostly in a few directions. With these as an orthonormal basis B (d, p),
low(x) = x B, and rest(x) the length of what B leaves of x,

    x . q  <=  low(x) . low(q) + rest(x) rest(q)        (Cauchy-Schwarz),

so a product with p numbers a vector instead of d rules out all but a few, which are then compared whole. In a family
without such directions nothing is ruled out; then all are compared.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

_SAMPLE = 1024  #: vectors that the directions are found from
_DIRECTIONS = 64  #: at most; more cost more than they rule out
_STEP = 16  #: directions are added so many at a time
_LEFT = 0.01  #: share of the squared length that may be left over; with this, most are ruled out
_HOPELESS = 0.5  #: with so much left over nothing is
_ROUNDING = 1e-4  #: of |x|^2, added to what is left: more than float32 products of d <= 16,000 numbers are off by
_BLOCK = 1 << 16  #: rows at a time
_FIRST = 8  #: one in so many, the longest, is looked at first
_HEAD = 16  #: rows of which the most promising one is compared
_RENEW = 4  #: the directions are found anew when a family has so many times the vectors


@dataclass(frozen=True)
class Sketch:
    """The first n vectors of a family in few numbers, the longest vectors first."""

    basis: Float32  #: B (d, p), orthonormal; p is 0 where it would not help
    rows: NDArray[np.intp]  #: (n,), where they are in the family
    norms: Float32  #: (n,), falling
    low: Float32  #: (n, p)
    rest: Float32  #: (n,), rounded up
    found_in: int  #: vectors, when the basis was found

    def __len__(self) -> int:
        return len(self.rows)

    def promising(self, matrix: Float32, query: Float32, where: NDArray[np.bool_], k: int) -> NDArray[np.intp] | None:
        """Rows among which are the k with the largest product with `query` (d,), and all that equal the last of them.

        `matrix` (m, d), m >= n, begins with the vectors of the sketch; `where` (m,) are the candidates. None: all.
        """
        n, size, count = len(self), len(self) // _FIRST // _HEAD * _HEAD, 4 * k + 32
        if not self.basis.size or size <= _HEAD * count:
            return None
        with np.errstate(over="ignore", invalid="ignore"):
            low, rest = _reduced(query[np.newaxis], self.basis)
            bound = self._bound(slice(0, size), low[0], rest[0], where)
            heads = bound.reshape(-1, _HEAD)
            first = np.argpartition(heads.max(axis=1), -count)[-count:]
            few = self.rows[first * _HEAD + heads[first].argmax(axis=1)]
            few = few[where[few]]
            if len(few) < k:
                return None
            least = np.partition(matrix[few] @ query, -k)[-k]  # k are at least as good as that
            # No product is larger than that of the lengths, so the shorter ones need no bound of their own.
            shortest = least / (np.sqrt(query @ query) * (1 + _ROUNDING))
            reached = n if not shortest > 0 else int(np.searchsorted(-self.norms, -shortest, side="right"))
            if reached > size:
                bound = np.concatenate([bound, self._bound(slice(size, reached), low[0], rest[0], where)])
            rows = self.rows[: len(bound)][~(bound < least)]  # a bound that is no number rules nothing out
        rows = np.concatenate([np.sort(rows), n + np.flatnonzero(where[n:])])
        return rows if 8 * len(rows) < len(where) else None

    def _bound(self, part: slice, low: Float32, rest: np.float32, where: NDArray[np.bool_]) -> Float32:
        """At least the products of some of the vectors with a query, whose low (p,) and rest are given."""
        bound: Float32 = self.low[part] @ low
        bound += self.rest[part] * rest
        bound[~where[self.rows[part]]] = -np.inf
        return bound


def sketch_of(matrix: Float32, before: Sketch | None = None) -> Sketch:
    """The sketch of all rows of a matrix (n, d); `before` is one of its first rows."""
    n = len(matrix)
    if before is None or n >= _RENEW * before.found_in:
        none = np.zeros(0, np.float32)
        before = Sketch(basis := _basis(matrix), none.astype(np.intp), none, basis[:0], none, n)
    start = len(before)
    low, rest, norms = (
        np.concatenate([known, np.empty((n - start, *known.shape[1:]), np.float32)])
        for known in (before.low, before.rest, before.norms)
    )
    for at in range(start, n, _BLOCK):
        block = matrix[at : at + _BLOCK]
        low[at : at + _BLOCK], rest[at : at + _BLOCK] = _reduced(block, before.basis)
        norms[at : at + _BLOCK] = np.sqrt(np.einsum("nd,nd->n", block, block))
    order = np.argsort(-norms, kind="stable")
    rows = np.concatenate([before.rows, np.arange(start, n)])
    return Sketch(before.basis, rows[order], norms[order], low[order], rest[order], before.found_in)


def _reduced(vectors: Float32, basis: Float32) -> tuple[Float32, Float32]:
    """low (n, p) and rest (n,) of vectors (n, d)."""
    with np.errstate(over="ignore", invalid="ignore"):
        low = vectors @ basis
        squares = np.einsum("nd,nd->n", vectors, vectors)
        left = np.maximum(squares - np.einsum("np,np->n", low, low), 0) + _ROUNDING * squares
        return low, np.sqrt(left)


def _basis(matrix: Float32) -> Float32:
    """The directions (d, p) in which a sample of the rows is longest."""
    chosen = np.random.default_rng(0).choice(len(matrix), min(_SAMPLE, len(matrix)), replace=False)
    sample = matrix[np.sort(chosen)].astype(np.float64)
    squares, weights = np.linalg.eigh(sample @ sample.T)  # of (n, n), which is smaller than (d, d) where d is large
    total = np.cumsum(squares[::-1])
    left = 1 - total[_STEP - 1 : _DIRECTIONS : _STEP] / total[-1] if total[-1] > 0 else np.ones(1)
    if not left.size or left[-1] > _HOPELESS:
        return np.zeros((matrix.shape[1], 0), np.float32)
    enough = np.flatnonzero(left <= _LEFT)
    width = _STEP * (int(enough[0]) + 1 if enough.size else len(left))
    return np.linalg.qr(sample.T @ weights[:, -width:])[0].astype(np.float32)
