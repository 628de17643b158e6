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
#: Of |x|^2, added to what is left, and of |x| |q|, taken off what has to be reached. Sums of d <= 16,000 products in
#: float32 are off by less, added in blocks, as NumPy and BLAS do; one after another the worst case would be d * 6e-8.
_ROUNDING = 1e-4
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
    low: Float32  #: (p + 1, n), the rest, rounded up, last; products are twice as fast this way round
    found_in: int  #: vectors, when the basis was found

    def __len__(self) -> int:
        return len(self.rows)

    def promising(self, matrix: Float32, query: Float32, where: NDArray[np.bool_], k: int) -> NDArray[np.intp] | None:
        """Rows among which are the k with the largest product with `query` (d,), and all that equal the last of them.

        `matrix` (m, d), m >= n, begins with the vectors of the sketch; `where` (m,) are the candidates. None: all.
        """
        n, size, count = len(self), len(self) // _FIRST // _HEAD * _HEAD, 4 * k + 32
        largest = np.abs(query).max()
        if not self.basis.size or size <= _HEAD * count or not 0 < largest < np.inf:
            return None
        query = query / largest  # the same rows are the best, and no square is lost in rounding to zero
        with np.errstate(over="ignore", invalid="ignore"):
            low = _reduced(query[np.newaxis], self.basis)[:, 0]
            bound = low @ self.low[:, :size]  # at least the product
            bound[~where[self.rows[:size]]] = -np.inf
            heads = bound.reshape(-1, _HEAD)
            first = np.argpartition(heads.max(axis=1), -count)[-count:]
            places = first * _HEAD + heads[first].argmax(axis=1)
            places = places[where[self.rows[places]]]
            if len(places) < k:
                return None
            length = np.sqrt(query @ query)
            products = matrix[self.rows[places]] @ query - _ROUNDING * length * self.norms[places]
            least = np.partition(products, -k)[-k]  # k are at least as good as that
            # No product is larger than that of the lengths, so the shorter ones need no bound of their own.
            shortest = least / (length * (1 + _ROUNDING))
            reached = n if not shortest > 0 else int(np.searchsorted(-self.norms, -shortest, side="right"))
            if reached > size:
                bound = np.concatenate([bound, low @ self.low[:, size:reached]])
            rows = self.rows[: len(bound)][~(bound < least)]  # a bound that is no number rules nothing out
        rows = np.concatenate([np.sort(rows[where[rows]]), n + np.flatnonzero(where[n:])])
        return rows if 8 * len(rows) < len(where) else None


def sketch_of(matrix: Float32, before: Sketch | None = None) -> Sketch:
    """The sketch of all rows of a matrix (n, d); `before` is one of its first rows."""
    n = len(matrix)
    if before is None or n >= _RENEW * before.found_in:
        none, basis = np.zeros(0, np.float32), _basis(matrix)
        before = Sketch(basis, none.astype(np.intp), none, np.zeros((basis.shape[1] + 1, 0), np.float32), n)
    start = len(before)
    low, norms = (
        np.concatenate([known, np.empty((*known.shape[:-1], n - start), np.float32)], axis=-1)
        for known in (before.low, before.norms)
    )
    for at in range(start, n, _BLOCK):
        block = matrix[at : at + _BLOCK]
        low[:, at : at + _BLOCK] = _reduced(block, before.basis)
        norms[at : at + _BLOCK] = np.sqrt(_squares(block))
    order = np.argsort(-norms, kind="stable")
    rows = np.concatenate([before.rows, np.arange(start, n)])
    return Sketch(before.basis, rows[order], norms[order], np.take(low, order, axis=1), before.found_in)


def _reduced(vectors: Float32, basis: Float32) -> Float32:
    """low and rest (p + 1, n) of vectors (n, d)."""
    with np.errstate(over="ignore", invalid="ignore"):
        low = basis.T @ vectors.T
        squares = _squares(vectors)
        left = np.maximum(squares - _squares(low.T), 0) + _ROUNDING * squares
        return np.concatenate([low, np.sqrt(left)[np.newaxis].astype(np.float32)])


def _squares(vectors: Float32) -> NDArray[np.float64]:
    """The squared lengths (n,) of vectors (n, d); in float64, where none is too small or too large."""
    squares: NDArray[np.float64] = np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64)
    return squares


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
