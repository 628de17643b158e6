"""The strategies of `tpv.grouping`: one function each, which chooses among the candidates, and the products they need.

A strategy knows the candidates by their rank, 0 for the most similar to the target. It gets their products with each
other, their similarities to the target (so candidate k has rank k), the largest size allowed, and the trade-off of
Eq. 5.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[Any]
Ranks = NDArray[np.int64]  #: ascending

EXACT_LIMIT = 26  #: candidates of `exact`: 67 million subsets
PAIRS_LIMIT = 10_000  #: candidates of `knowledge-consistency`: 50 million pairs

BLOCK = 256  #: rows multiplied at a time; with d = 768 they stay in a core's cache


class Choice(NamedTuple):
    members: Ranks
    decided: int  # the candidates from this rank on met a full group


def greedy(products: Products, similarities: Floats, max_size: int, trade_off: float) -> Choice:
    """Algorithm 2, a block of candidates at a time: one product with the group's sum decides up to the next one taken.

    The block grows while nothing is taken, and begins again with what the last one took, so that few products are
    computed in vain.
    """
    members: list[int] = []
    group_sum = products.zero()
    pair_sum = consistency = longest = second = 0.0  # the lengths are those of members
    rank, block = 0, 1
    while rank < len(similarities) and len(members) < max_size:
        ranks = np.arange(rank, min(rank + block, len(similarities)))
        size = len(members) + 1
        added, norms = products.with_sum(ranks, group_sum)
        after = 2 * (pair_sum + added) / max(1, size * (size - 1))  # Eq. 4; of one source the sum is 0
        # The product of the two longest: no product of two different ones is larger, nor its rounding.
        scale = np.maximum(longest, norms) * np.maximum(second, np.minimum(longest, norms))
        fits = after - consistency >= -products.tolerance * scale
        first = int(fits.argmax())
        if not fits[first]:
            # Picking so many rows one by one would take longer than multiplying all.
            rank, block = rank + len(ranks), 2 * block if 64 * block < len(similarities) else len(similarities)
            continue
        members.append(rank + first)
        group_sum = group_sum + products.of_member(rank + first)
        pair_sum, consistency = pair_sum + float(added[first]), float(after[first])
        norm = float(norms[first])
        longest, second = max(longest, norm), max(second, min(longest, norm))
        rank, block = rank + first + 1, first + 1
    full = len(members) == max_size
    return Choice(np.asarray(members, dtype=np.int64), rank if full else len(similarities))


def prefix(products: Products, similarities: Floats, max_size: int, trade_off: float) -> Choice:
    """A longer prefix is better only if its KC is higher by more than rounding; a single source counts 0."""
    ranks = np.arange(min(len(similarities), max_size))
    _, after = consistencies(products, ranks, np.ones(len(ranks), dtype=bool))
    norms = products.norms(ranks)
    longest = np.maximum.accumulate(norms)
    # What is no longer than the longest before it may be the second, and so may that longest itself.
    second = np.maximum.accumulate(np.minimum(norms, np.concatenate([[0.0], longest[:-1]])[: len(norms)]))
    tolerance = products.tolerance * longest * second
    best, highest = 0, 0.0
    for rank, (value, rounding) in enumerate(zip(after.tolist(), tolerance.tolist(), strict=True)):
        if value - highest > rounding:
            best, highest = rank, value
    return Choice(ranks[: best + 1], len(ranks))


def exact(products: Products, similarities: Floats, max_size: int, trade_off: float) -> Choice:
    """The highest TS + trade_off * KC of all subsets, by enumeration; the empty one has 0.

    Of subsets that are equal up to rounding, the smallest, then the one whose ranks come first: {0, 3} before {1, 2}.
    A subset is one of the upper ranks and one of the lower; the pair similarities between these are a matrix product.
    """
    n = len(similarities)
    if n > EXACT_LIMIT:
        raise ValueError(
            f"the strategy 'exact' tries all subsets of at most {EXACT_LIMIT} candidates, and here are {n}: give fewer "
            "of them, a higher min_similarity, or use 'greedy'"
        )
    ranks = np.arange(n)
    gram = products.matrix(ranks, ranks).astype(np.float64)
    similarities = similarities.astype(np.float64)
    longest = np.sort(np.sqrt(np.diagonal(gram)))[-2:]  # no pair similarity is larger than the product of two lengths
    pairs_scale = float(longest.prod()) if n > 1 else 0.0
    rounding = products.tolerance * (np.abs(similarities).max(initial=0) + trade_off * pairs_scale)
    half = n // 2
    upper, lower = _subsets(half), _subsets(n - half)  # (2^k, k), ones and zeros
    upper_size, lower_size = upper.sum(axis=1).astype(int), lower.sum(axis=1).astype(int)
    upper_sum, lower_sum = upper @ similarities[:half], lower @ similarities[half:]
    upper_pairs, lower_pairs = _pair_sums(gram[:half, :half], upper), _pair_sums(gram[half:, half:], lower)
    between = upper @ gram[:half, half:]  # (2^half, n - half)
    # What one similarity and one pair similarity weigh in a subset of 0, 1, ... n sources; nothing if it is too large:
    # such a subset counts as much as the empty one, which is smaller.
    size = np.arange(n + 1)
    member_weight = np.where((size > 0) & (size <= max_size), 1 / np.maximum(size, 1), 0)
    pair_weight = np.where((size > 1) & (size <= max_size), 2 * trade_off / np.maximum(size * (size - 1), 1), 0)

    def objectives(rows: Ranks) -> Floats:
        """Eq. 5 of each of these upper subsets, equal in size, together with each lower one, (k, 2^(n - half))."""
        total = upper_size[rows[0]] + lower_size
        values = between[rows] @ lower.T
        values += upper_pairs[rows, None]
        values += lower_pairs
        values *= pair_weight[total]
        values += (upper_sum[rows, None] + lower_sum) * member_weight[total]
        return values

    # Each block has upper subsets of one size, and at the limit one megabyte of objectives.
    blocks = [
        rows[first : first + BLOCK // 16]
        for upper_count in range(min(half, max_size) + 1)
        for rows in [np.flatnonzero(upper_size == upper_count)]
        for first in range(0, len(rows), BLOCK // 16)
    ]
    highest = [objectives(rows).max() for rows in blocks]
    equal = max(highest) - rounding
    best_size, best_subset = n + 1, 0
    for rows, value in zip(blocks, highest, strict=True):
        if value < equal or upper_size[rows[0]] > best_size:
            continue
        row, column = np.nonzero(objectives(rows) >= equal)
        sizes = upper_size[rows[row]] + lower_size[column]
        subsets = (rows[row] << (n - half)) + column  # as binary numbers, whose first digit is rank 0
        smallest = int(sizes.min())
        first_subset = int(subsets[sizes == smallest].max())
        if smallest < best_size or (smallest == best_size and first_subset > best_subset):
            best_size, best_subset = smallest, first_subset
    return Choice(np.asarray([rank for rank in range(n) if best_subset >> (n - 1 - rank) & 1], dtype=np.int64), n)


def best_pair(products: Products, similarities: Floats, max_size: int, trade_off: float) -> Choice:
    """The pair of highest similarity, if that is positive: a mean over pairs is never higher than the best of them.

    Of pairs that are equal up to rounding, the one whose ranks come first.
    """
    n = len(similarities)
    if n > PAIRS_LIMIT:
        raise ValueError(
            f"the strategy 'knowledge-consistency' compares all pairs of at most {PAIRS_LIMIT} candidates, and here "
            f"are {n}: give fewer of them, a higher min_similarity, or use 'greedy'"
        )
    none = Choice(np.zeros(0, dtype=np.int64), n)
    if n < 2 or max_size < 2:
        return none

    def pairs(first: int) -> Floats:
        """Similarities of the candidates from rank `first` on with those that rank after them; -inf elsewhere."""
        values = products.matrix(np.arange(first, min(first + BLOCK, n)), np.arange(first, n))
        values[np.tril_indices(len(values), m=values.shape[1])] = -np.inf
        return values

    starts = range(0, n - 1, BLOCK)
    highest = []
    value, pair = -np.inf, (0, 0)
    for first in starts:
        values = pairs(first)
        row, column = np.unravel_index(values.argmax(), values.shape)
        highest.append(float(values[row, column]))
        if highest[-1] > value:
            value, pair = highest[-1], (first + int(row), first + int(column))
    rounding = products.tolerance * float(products.norms(np.asarray(pair)).prod())
    if value <= rounding:
        return none
    first = next(first for first, found in zip(starts, highest, strict=True) if found >= value - rounding)
    values = pairs(first)
    row, column = np.unravel_index((values >= value - rounding).argmax(), values.shape)
    return Choice(np.asarray([first + row, first + column]), n)


def most_similar(products: Products, similarities: Floats, max_size: int, trade_off: float) -> Choice:
    """The first of the ranking: all candidates, or as many as are allowed."""
    members = np.arange(min(len(similarities), max_size))
    return Choice(members, len(members))


def consistencies(products: Products, ranks: Ranks, inside: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """KC of those `inside` that stand before each of these sources, without it and with it, by running sums."""
    added = products.with_sums_before(ranks, inside)
    size: Ranks = np.cumsum(inside) - inside
    pair_sum = np.concatenate([[0.0], np.cumsum(added * inside)])[: len(ranks)]
    before = 2 * pair_sum / np.maximum(size * (size - 1), 1)
    after = 2 * (pair_sum + added) / np.maximum(size * (size + 1), 1)
    return before, after


def _subsets(size: int) -> Floats:
    """All subsets of so many things, (2^size, size) ones and zeros: row m has the binary digits of m."""
    return (np.arange(2**size)[:, None] >> np.arange(size)[::-1] & 1).astype(np.float64)


def _pair_sums(gram: Floats, subsets: Floats) -> Floats:
    """The sum of the pair similarities inside each subset, (k,)."""
    return np.asarray(((subsets @ np.triu(gram, k=1)) * subsets).sum(axis=1))


class Vectors:
    """Products of the rows of a NumPy array, each taken when it is asked for.

    The sum g of a group's members is float64, products have the array's dtype. The product of a row with g does not
    depend on the rows around it, as that of a matrix and a vector may.
    """

    def __init__(self, sources: Floats, ranking: Ranks) -> None:
        self.sources, self.ranking = sources, ranking
        self.tolerance = 16 * float(np.finfo(sources.dtype).eps)
        self._norms: Floats | None = None

    def zero(self) -> Floats:
        """The sum g of no members."""
        return np.zeros(self.sources.shape[1])

    def of_member(self, rank: int) -> Floats:
        """What a member adds to g."""
        return np.asarray(self.sources[self.ranking[rank]])

    def with_sum(self, ranks: Ranks, group_sum: Floats) -> tuple[Floats, Floats]:
        """s . g and the length |s| of each of these sources s, (k,) and (k,)."""
        group_sum = group_sum.astype(self.sources.dtype)
        if len(ranks) > len(self.sources) // 16:  # reading all rows in their order is quicker than picking these
            added, norms = self._all_with_sum(group_sum)
            return _finite(added[self.ranking[ranks]]), _finite(norms[self.ranking[ranks]])
        rows = self.sources[self.ranking[ranks]]
        return _finite(np.vecdot(rows, group_sum).astype(np.float64)), self.norms(ranks)

    def _all_with_sum(self, group_sum: Floats) -> tuple[Floats, Floats]:
        """s . g and |s| of every source s, (n,) and (n,); the lengths are taken once, while the rows are read."""
        added, norms = np.empty(len(self.sources)), self._norms
        if norms is None:
            norms = np.empty(len(self.sources))
        for first in range(0, len(self.sources), BLOCK):
            rows = self.sources[first : first + BLOCK]
            added[first : first + BLOCK] = np.vecdot(rows, group_sum)
            if self._norms is None:
                norms[first : first + BLOCK] = np.sqrt(np.vecdot(rows, rows))
        self._norms = norms
        return added, norms

    def with_sums_before(self, ranks: Ranks, inside: NDArray[np.bool_]) -> Floats:
        """s . g of each of these sources s, (k,), where g is the sum of those before it that are `inside`."""
        added = [np.zeros(0)]
        group_sum = self.zero()
        for first in range(0, len(ranks), BLOCK):
            rows, joins = self.sources[self.ranking[ranks[first : first + BLOCK]]], inside[first : first + BLOCK]
            sums = [group_sum]
            for row in rows[joins]:  # a cumulative sum over the rows of an array is slower
                sums.append(sums[-1] + row)
            members_before: Ranks = np.cumsum(joins) - joins
            added.append(np.vecdot(rows, np.asarray(sums, dtype=rows.dtype)[members_before]))
            group_sum = sums[-1]
        return _finite(np.concatenate(added))

    def norms(self, ranks: Ranks) -> Floats:
        blocks = (self.sources[self.ranking[ranks[first : first + BLOCK]]] for first in range(0, len(ranks), BLOCK))
        return _finite(np.concatenate([np.zeros(0), *(np.sqrt(np.vecdot(rows, rows)) for rows in blocks)]))

    def matrix(self, rows: Ranks, columns: Ranks) -> Floats:
        """`result[i, j]` is the product of the i-th of `rows` with the j-th of `columns`."""
        return _finite(np.asarray(self.sources[self.ranking[rows]] @ self.sources[self.ranking[columns]].T))


class Gram:
    """The same where all products are known: a look-up each. Here g is the sum of the members' rows of the matrix."""

    def __init__(self, gram: Floats, ranking: Ranks, eps: float) -> None:
        self.gram, self.ranking = gram, ranking
        self.tolerance = 16 * eps

    def zero(self) -> Floats:
        return np.zeros(len(self.gram))

    def of_member(self, rank: int) -> Floats:
        return np.asarray(self.gram[self.ranking[rank]])

    def with_sum(self, ranks: Ranks, group_sum: Floats) -> tuple[Floats, Floats]:
        return _finite(group_sum[self.ranking[ranks]]), self.norms(ranks)

    def with_sums_before(self, ranks: Ranks, inside: NDArray[np.bool_]) -> Floats:
        return np.asarray(np.tril(self.matrix(ranks, ranks).astype(np.float64) * inside, k=-1).sum(axis=1))

    def norms(self, ranks: Ranks) -> Floats:
        return _finite(np.sqrt(self.gram.diagonal()[self.ranking[ranks]].astype(np.float64)))

    def matrix(self, rows: Ranks, columns: Ranks) -> Floats:
        return _finite(np.asarray(self.gram[np.ix_(self.ranking[rows], self.ranking[columns])]))


def _finite(products: Floats) -> Floats:
    if not np.isfinite(products).all():
        raise ValueError("products of the sources leave the range of their dtype: scale the vectors or use float64")
    return products


Products = Vectors | Gram
