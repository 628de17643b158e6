"""Which source tasks help a target together: Section 3.3 and Algorithm 2 of Dynamic Task Vector Grouping.

Paper: https://arxiv.org/abs/2503.18063. Everything works on pooled vectors (`tpv.similarity.pool`) of any array
library. Products of arrays on a device are taken there, and only n + n * n numbers come to the host, once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from array_api_compat import array_namespace, is_numpy_array
from numpy.typing import NDArray

Array = Any
Strategy = Literal["greedy"]
Reason = Literal["taken", "negative-similarity", "below-min-similarity", "consistency-falls", "group-full"]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Why one source was taken or left, in the order of the ranking."""

    index: int  #: of the source, as it was given
    rank: int  #: 0 is the most similar to the target
    similarity: float  #: to the target, Eq. 2
    consistency_before: float  #: KC of the group so far, Eq. 4
    consistency_after: float  #: KC if this source were in it
    taken: bool
    reason: Reason


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """A group of source tasks, with the figures and the decisions that led to it."""

    members: tuple[int, ...]  #: indices of the sources, in the order taken
    target_similarity: float  #: TS, Eq. 3; 0 for the empty group
    knowledge_consistency: float  #: KC, Eq. 4; 0 for fewer than two members
    objective: float  #: TS + KC, Eq. 5 with a trade-off of 1
    trace: tuple[Decision, ...]


def group(
    target: Array,
    sources: Array,
    *,
    strategy: Strategy = "greedy",
    max_size: int | None = None,
    min_similarity: float | None = None,
) -> Grouping:
    """Groups the sources, pooled vectors (n, d), for a target, pooled vector (d,).

    `greedy` is Algorithm 2: walk the ranking by similarity to the target and take a source if its similarity is not
    negative and KC does not fall. A change of KC above -eps * scale counts as no fall (scale: the largest squared norm
    in the group), so that ties do not hang on rounding; equal similarities rank by input index. `min_similarity`
    replaces the paper's zero, `max_size` bounds the group.
    """
    if strategy != "greedy":
        raise ValueError(f"unknown strategy {strategy!r}: use 'greedy'")
    pairs: _Pairs
    if is_numpy_array(sources):
        similarities = sources @ target
        pairs = _RunningSum(sources)
    else:
        xp = array_namespace(target, sources)
        products = _to_host(
            sources @ xp.concat([target[:, None], xp.permute_dims(sources, (1, 0))], axis=1)
        )  # (n, 1 + n)
        similarities, pairs = products[:, 0], _Gram(products[:, 1:])
    return _greedy(similarities, pairs, max_size=max_size, min_similarity=min_similarity)


def knowledge_consistency(sources: Array) -> float:
    """KC of a whole group of pooled vectors (n, d), by its definition: the mean similarity of its pairs (Eq. 4)."""
    n = sources.shape[0]
    if n < 2:
        return 0.0
    gram = sources @ array_namespace(sources).permute_dims(sources, (1, 0))
    return float(sum(gram[i, j] for i in range(n) for j in range(i + 1, n)) * 2 / (n * (n - 1)))


class _Pairs(Protocol):
    """Similarities between a candidate and the group so far."""

    eps: float

    def with_group(self, index: int) -> float: ...  # sum of its similarities to the members
    def squared_norm(self, index: int) -> float: ...
    def add(self, index: int) -> None: ...


class _RunningSum:
    """Keeps the sum g of the members' vectors: a candidate costs one product s . g, and no (n, n) matrix is made."""

    def __init__(self, sources: NDArray[Any]) -> None:
        self.sources, self.eps = sources, 16 * float(np.finfo(sources.dtype).eps)
        self.group_sum = np.zeros(sources.shape[1], dtype=sources.dtype)

    def with_group(self, index: int) -> float:
        return float(self.sources[index] @ self.group_sum)

    def squared_norm(self, index: int) -> float:
        return float(self.sources[index] @ self.sources[index])

    def add(self, index: int) -> None:
        self.group_sum += self.sources[index]


class _Gram:
    """Works on the (n, n) matrix of similarities that a device computed: a candidate costs one look-up."""

    def __init__(self, gram: NDArray[Any]) -> None:
        self.gram, self.eps = gram, 16 * float(np.finfo(gram.dtype).eps)
        self.group_row = np.zeros(len(gram), dtype=gram.dtype)

    def with_group(self, index: int) -> float:
        return float(self.group_row[index])

    def squared_norm(self, index: int) -> float:
        return float(self.gram[index, index])

    def add(self, index: int) -> None:
        self.group_row += self.gram[index]


def _greedy(
    similarities: NDArray[Any], pairs: _Pairs, *, max_size: int | None, min_similarity: float | None
) -> Grouping:
    members: list[int] = []
    pair_sum = consistency = scale = 0.0
    trace = []
    for rank, index in enumerate(np.argsort(-similarities, kind="stable").tolist()):
        similarity = float(similarities[index])
        size = len(members) + 1
        added = pairs.with_group(index)
        after = 2 * (pair_sum + added) / (size * (size - 1)) if size > 1 else 0.0
        tolerance = pairs.eps * max(scale, pairs.squared_norm(index))
        reason: Reason = "taken"
        if min_similarity is not None and similarity < min_similarity:
            reason = "below-min-similarity"
        elif min_similarity is None and similarity < 0:
            reason = "negative-similarity"
        elif max_size is not None and size > max_size:
            reason = "group-full"
        elif after - consistency < -tolerance:
            reason = "consistency-falls"
        trace.append(
            Decision(
                index=index,
                rank=rank,
                similarity=similarity,
                consistency_before=consistency,
                consistency_after=after,
                taken=reason == "taken",
                reason=reason,
            )
        )
        if reason == "taken":
            scale = max(scale, pairs.squared_norm(index))
            members.append(index)
            pairs.add(index)
            pair_sum, consistency = pair_sum + added, after
    target_similarity = float(similarities[members].mean()) if members else 0.0
    return Grouping(
        members=tuple(members),
        target_similarity=target_similarity,
        knowledge_consistency=consistency,
        objective=target_similarity + consistency,
        trace=tuple(trace),
    )


def _to_host(array: Array) -> NDArray[Any]:
    """A NumPy copy of an array that may live on a device."""
    return np.asarray(array.cpu() if hasattr(array, "cpu") else array)
