"""Which source tasks help a target together: Section 3.3 and Algorithm 2 of Dynamic Task Vector Grouping.

Paper: https://arxiv.org/abs/2503.18063. Everything works on pooled vectors (`tpv.similarity.pool`) of any array
library. Each strategy is a function that chooses among the candidates in the order of their ranking. The trace is
computed from its choice, for those decisions that are listed.

Of NumPy arrays only the products that a strategy asks for are taken: knowledge consistency (KC) is kept by running
sums, so a source costs one product, and no (n, n) matrix is made. Of other arrays all products are taken where they
live, and n + n * n numbers come to the host, once.

Equal similarities rank by `tie_order`. Values of KC whose difference is at most 16 * eps * scale are equal, with the
eps of the dtype and the product of the two largest norms among the sources concerned as scale: so far may rounding
reach, and neither copies of a source nor the array library should change a decision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from array_api_compat import array_namespace, is_numpy_array
from numpy.typing import ArrayLike, NDArray

from tpv._strategies import EXACT_LIMIT as EXACT_LIMIT
from tpv._strategies import PAIRS_LIMIT as PAIRS_LIMIT
from tpv._strategies import (
    Choice,
    Floats,
    Gram,
    Products,
    Ranks,
    Vectors,
    best_pair,
    consistencies,
    exact,
    greedy,
    most_similar,
    prefix,
)
from tpv.similarity import dot

Array = Any

Strategy = Literal["greedy", "prefix", "exact", "target-similarity", "knowledge-consistency", "all", "top-k"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)

Reason = Literal[
    "taken",
    "negative-similarity",
    "below-min-similarity",
    "group-full",  # `max_size` sources were taken before it (`prefix`: looked at)
    "consistency-falls",  # greedy
    "after-best-prefix",  # prefix
    "not-in-optimum",  # exact
    "not-in-best-pair",  # knowledge-consistency
]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Why one source was taken or left.

    `consistency_before` is KC (Eq. 4) of the sources taken before this one, `consistency_after` KC of them and this
    one. `prefix` compares the prefixes of the ranking: there it is KC of all candidates that rank before this one.
    """

    index: int  #: of the source, as it was given
    rank: int  #: 0 is the most similar to the target
    similarity: float  #: to the target
    consistency_before: float
    consistency_after: float
    taken: bool
    reason: Reason


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """A group of source tasks, with the figures and the decisions that led to it.

    The trace is enough to compute the rest: the members are the sources taken, TS is the mean of their similarities, KC
    is the last one's `consistency_after`.
    """

    members: tuple[int, ...]  #: indices of the sources, in the order of the ranking
    target_similarity: float  #: TS, Eq. 3; 0 for the empty group
    knowledge_consistency: float  #: KC, Eq. 4; 0 for fewer than two members
    objective: float  #: TS + trade_off * KC, Eq. 5
    trace: tuple[Decision, ...]  #: in the order of the ranking
    trace_total: int  #: how many decisions there were; `trace` has fewer if it was cut


def group(
    target: Array,
    sources: Array,
    *,
    strategy: Strategy = "greedy",
    trade_off: float | None = None,
    max_size: int | None = None,
    min_similarity: float | None = None,
    similarities: Array | None = None,
    where: ArrayLike | None = None,
    tie_order: ArrayLike | None = None,
    trace_size: int | None = None,
) -> Grouping:
    """Groups the sources, pooled vectors (n, d), for a target, pooled vector (d,) of the same float dtype.

    | strategy | takes |
    |---|---|
    | `greedy` | along the ranking, what is not negative and does not let KC fall: Algorithm 2 |
    | `prefix` | of what is not negative, the ranking's first prefix of highest KC: the authors' released code |
    | `exact` | the optimum of Eq. 5, TS + trade_off * KC, over all subsets of at most EXACT_LIMIT candidates |
    | `target-similarity` | all that is not negative |
    | `knowledge-consistency` | the highest KC, target ignored: the best pair of at most PAIRS_LIMIT candidates |
    | `all` | everything |
    | `top-k` | the `max_size` most similar |

    `min_similarity` replaces the strategy's own bound (zero or none), `max_size` bounds the group, whatever the
    strategy. `trade_off`, the lambda of Eq. 5, is 1 if not given and only for `exact`.

    `similarities` (n,) are those to the target, if they are known already. `where` (n,) is true for the sources to look
    at; the others appear nowhere. `tie_order` (n,) are integers by which equal similarities rank, then by index.
    `trace_size` cuts the trace to the sources taken and, up to that size, the others that rank highest.

    Raises ValueError for options that do not fit the strategy, for shapes that do not fit each other, for products that
    are not finite, and for more candidates than the strategy can decide.
    """
    _check_options(strategy, trade_off, max_size, trace_size)
    _check_shapes(target, sources, similarities=similarities, where=where, tie_order=tie_order)
    n = sources.shape[0]
    rule = _RULES[strategy]
    trade_off = 1.0 if trade_off is None else trade_off
    bound = rule.min_similarity if min_similarity is None else min_similarity

    found, gram = _to_host(target, sources, similarities)
    eps = float(array_namespace(sources).finfo(sources.dtype).eps)
    ranking = _ranking(found, where, tie_order)
    ranked = found[ranking]
    products: Products = Vectors(np.asarray(sources), ranking) if gram is None else Gram(gram, ranking, eps)
    candidates = int(np.count_nonzero(ranked >= bound))  # the first of the ranking
    choice = rule.choose(products, ranked[:candidates], n if max_size is None else max_size, trade_off)

    below: Reason = "negative-similarity" if min_similarity is None else "below-min-similarity"
    listed, taken = _listed(choice.members, len(ranking), trace_size)
    before, after = consistencies(products, listed, listed < choice.decided if strategy == "prefix" else taken)
    trace = []
    for rank, index, similarity, kc_before, kc_after, is_taken in zip(
        listed.tolist(),
        ranking[listed].tolist(),
        ranked[listed].tolist(),
        before.tolist(),
        after.tolist(),
        taken.tolist(),
        strict=True,
    ):
        reason: Reason = "taken"
        if rank >= candidates:
            reason = below
        elif rank >= choice.decided:
            reason = "group-full"
        elif not is_taken:
            reason = rule.left
        trace.append(
            Decision(
                index=index,
                rank=rank,
                similarity=similarity,
                consistency_before=kc_before,
                consistency_after=kc_after,
                taken=is_taken,
                reason=reason,
            )
        )

    members = [decision for decision in trace if decision.taken]
    target_similarity = sum(decision.similarity for decision in members) / max(1, len(members))
    consistency = members[-1].consistency_after if members else 0.0
    objective = target_similarity + trade_off * consistency
    return Grouping(
        members=tuple(decision.index for decision in members),
        target_similarity=target_similarity,
        knowledge_consistency=consistency,
        objective=objective,
        trace=tuple(trace),
        trace_total=len(ranking),
    )


def knowledge_consistency(sources: Array) -> float:
    """KC of a whole group of pooled vectors (n, d), by its definition: the mean similarity of its pairs (Eq. 4)."""
    n = int(sources.shape[0])
    if n < 2:
        return 0.0
    xp = array_namespace(sources)
    pair_sum = float(xp.sum(xp.triu(dot(sources, sources), k=1)))
    return 2 * pair_sum / (n * (n - 1))


class _Rule(NamedTuple):
    choose: Callable[[Products, Floats, int, float], Choice]
    min_similarity: float  # the strategy's own bound
    left: Reason  # why a candidate was not taken, unless the group was full


_RULES: dict[Strategy, _Rule] = {
    "greedy": _Rule(greedy, 0.0, "consistency-falls"),
    "prefix": _Rule(prefix, 0.0, "after-best-prefix"),
    "exact": _Rule(exact, -np.inf, "not-in-optimum"),
    "target-similarity": _Rule(most_similar, 0.0, "group-full"),
    "knowledge-consistency": _Rule(best_pair, -np.inf, "not-in-best-pair"),
    "all": _Rule(most_similar, -np.inf, "group-full"),
    "top-k": _Rule(most_similar, -np.inf, "group-full"),
}


def _to_host(target: Array, sources: Array, similarities: Array | None) -> tuple[Floats, Floats | None]:
    """The similarities (n,), and for arrays that may live on a device all products (n, n), as NumPy arrays."""
    if is_numpy_array(sources):
        return dot(sources, target) if similarities is None else np.asarray(similarities), None
    xp = array_namespace(target, sources)
    similarities = dot(sources, target) if similarities is None else xp.astype(similarities, sources.dtype)
    together = xp.concat([similarities[:, None], dot(sources, sources)], axis=1)  # (n, 1 + n)
    if hasattr(together, "detach"):  # of torch, where NumPy takes neither what has a gradient nor bfloat16
        together = together.detach().cpu().double()
    host = np.asarray(together)
    return host[:, 0], host[:, 1:]


def _ranking(similarities: Floats, where: ArrayLike | None, tie_order: ArrayLike | None) -> Ranks:
    """Indices of the sources by falling similarity, equal ones by `tie_order`."""
    indices = np.arange(len(similarities)) if where is None else np.flatnonzero(np.asarray(where))
    finite = np.isfinite(similarities[indices])
    if not finite.all():
        bad = indices[finite.argmin()]
        raise ValueError(f"the similarity of source {bad} is {similarities[bad]}: it is no finite {similarities.dtype}")
    ranking = indices[np.argsort(-similarities[indices])]
    # Of a large pool few similarities are equal: sorting those again is quicker than one stable sort by two keys.
    ranked = similarities[ranking]
    equal = ranked[1:] == ranked[:-1]
    if equal.any():
        tied = np.concatenate([equal, [False]]) | np.concatenate([[False], equal])
        among = ranking[tied]
        told = [] if tie_order is None else [np.asarray(tie_order)[among]]
        ranking[tied] = among[np.lexsort((among, *told, -ranked[tied]))]  # the last key is the first to count
    return ranking


def _listed(members: Ranks, total: int, trace_size: int | None) -> tuple[Ranks, NDArray[np.bool_]]:
    """The ranks that a trace lists, all or the members and, up to its size, the first others; which are members."""
    is_member = np.zeros(total, dtype=bool)
    is_member[members] = True
    listed = np.arange(total)
    if trace_size is not None:
        others = np.flatnonzero(~is_member[:trace_size])[: max(0, trace_size - len(members))]
        listed = np.sort(np.concatenate([members, others]))
    return listed, is_member[listed]


def _check_options(strategy: Strategy, trade_off: float | None, max_size: int | None, trace_size: int | None) -> None:
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy {strategy!r}: use one of {', '.join(STRATEGIES)}")
    if trade_off is not None and strategy != "exact":
        raise ValueError(f"the strategy {strategy!r} takes no trade_off: only 'exact' weighs KC against TS")
    if trade_off is not None and not 0 <= trade_off < np.inf:
        raise ValueError(f"trade_off is {trade_off}: it is a finite number of at least 0")
    if max_size is None and strategy == "top-k":
        raise ValueError("the strategy 'top-k' needs max_size, its k")
    for name, size in (("max_size", max_size), ("trace_size", trace_size)):
        if size is not None and size < 0:
            raise ValueError(f"{name} is {size}: it is at least 0")


def _check_shapes(target: Array, sources: Array, **per_source: Any) -> None:
    if sources.ndim != 2 or tuple(target.shape) != (sources.shape[1],):
        raise ValueError(f"the target is {list(target.shape)}, the sources {list(sources.shape)}: give (d,) and (n, d)")
    for name, values in per_source.items():
        if values is not None and tuple(np.shape(values)) != (sources.shape[0],):
            raise ValueError(f"{name} is {list(np.shape(values))}: it has one value for each of {len(sources)} sources")
