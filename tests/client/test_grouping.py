from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpv.grouping import EXACT_LIMIT, PAIRS_LIMIT, STRATEGIES, Grouping, group, knowledge_consistency

small = st.integers(0, 9), st.integers(1, 5), st.integers(0, 2**32 - 1)


# The definitions, as literally as they can be written.


def sim(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b)


def KC(sources: list[np.ndarray]) -> float:  # noqa: N802 # Eq. 4
    pairs = [sim(a, b) for a, b in combinations(sources, 2)]
    return sum(pairs) / len(pairs) if pairs else 0.0


def TS(sources: list[np.ndarray], t: np.ndarray) -> float:  # noqa: N802 # Eq. 3
    return sum(sim(s, t) for s in sources) / len(sources) if sources else 0.0


def rounding(sources: list[np.ndarray]) -> float:
    """How far KC may be off: the eps of the dtype, times the product of the two longest of these."""
    lengths = sorted(np.sqrt(sim(s, s)) for s in sources)
    return float(16 * np.finfo(sources[0].dtype).eps * np.prod(lengths[-2:])) if len(lengths) > 1 else 0.0


def ranking(t: np.ndarray, S: np.ndarray) -> list[int]:
    return sorted(range(len(S)), key=lambda i: (-sim(t, S[i]), i))


def algorithm_2(t: np.ndarray, S: np.ndarray) -> list[int]:
    """Algorithm 2 of the paper, line by line, with the tie rule that rounding asks for."""
    group: list[int] = []
    for i in ranking(t, S):
        contribution = KC([S[j] for j in [*group, i]]) - KC([S[j] for j in group])
        if sim(t, S[i]) >= 0 and contribution >= -rounding([S[j] for j in [*group, i]]):
            group.append(i)
    return group


def best_prefix(t: np.ndarray, S: np.ndarray) -> list[int]:
    """What the authors' released code does: sources that are not negative, ranked; the first prefix of highest KC."""
    positive = [i for i in ranking(t, S) if sim(t, S[i]) >= 0]
    best = positive[:1]
    for size in range(2, len(positive) + 1):
        prefix = [S[i] for i in positive[:size]]
        if KC(prefix) - KC([S[i] for i in best]) > rounding(prefix):
            best = positive[:size]
    return best


def optimum(t: np.ndarray, S: np.ndarray, trade_off: float, max_size: int) -> list[int]:
    """Eq. 5 over all subsets; of equal ones the smallest, then the first in the order of the ranking."""
    ranked = ranking(t, S)
    subsets = [[*subset] for size in range(min(len(S), max_size) + 1) for subset in combinations(ranked, size)]
    values = [TS([S[i] for i in subset], t) + trade_off * KC([S[i] for i in subset]) for subset in subsets]
    off = (
        16 * np.finfo(S.dtype).eps * max([0.0, *(abs(sim(t, s)) for s in S)]) + trade_off * rounding([*S])
        if len(S)
        else 0
    )
    return next(subset for subset, value in zip(subsets, values, strict=True) if value >= max(values) - off)


# Instances.


def normal(n: int, d: int, seed: int, dtype: Any = np.float64) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    return draw.normal(size=d).astype(dtype), draw.normal(size=(n, d)).astype(dtype)


def integers(n: int, d: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Small whole numbers, so that sums are exact and ties are many."""
    draw = np.random.default_rng(seed)
    return draw.integers(-2, 3, d).astype(float), draw.integers(-2, 3, (n, d)).astype(float)


def instances(count: int, dtype: Any = np.float64) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of n = 0 to 12 sources: any, with a common part, whole numbers, copies, zeros, none or one that is positive."""
    draw = np.random.default_rng(count)
    for number in range(count):
        n, d = int(draw.integers(0, 13)), int(draw.integers(1, 7))
        t, S = draw.normal(size=d), draw.normal(size=(n, d))
        kind = number % 6
        if kind == 1:
            S += 2 * t
        elif kind == 2:
            t, S = np.rint(2 * t), np.rint(2 * S)
        elif kind == 3 and n:
            S = S[draw.integers(0, n, n)]
        elif kind == 4:
            S[draw.random(n) < 0.4] = 0
        elif kind == 5 and n:
            S *= -np.sign(S @ t)[:, None]
            S[0] *= draw.choice([-1, 1])
        yield t.astype(dtype), S.astype(dtype)


# Strategies.


def test_one_long_vector_does_not_hide_what_the_others_do() -> None:
    t = np.array([1, 0], dtype=np.float32)
    S = np.array([[1, 0], [1, 0], [0, 1000]], dtype=np.float32)
    assert group(t, S).members == (0, 1)
    assert group(t, S, strategy="prefix").members == (0, 1)
    assert group(t, S, strategy="exact").members == (0, 1)
    assert group(t, np.array([[1e4, 0], [1e-3, 0]], np.float32), strategy="knowledge-consistency").members == (0, 1)


@settings(max_examples=100)
@given(*small)
def test_no_member_lowers_kc_by_more_than_rounding_however_long_vectors_are(n: int, d: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    lengths = 10.0 ** draw.integers(-1, 4, (n, 1))
    t, S = draw.normal(size=d).astype(np.float32), (draw.normal(size=(n, d)) * lengths).astype(np.float32)
    group_: list[np.ndarray] = []
    for i in group(t, S).members:
        before, group_ = group_, [*group_, S[i]]
        fall = KC([s.astype(float) for s in before]) - KC([s.astype(float) for s in group_])
        assert fall <= 2 * rounding(group_)


def test_greedy_is_algorithm_2() -> None:
    for t, S in instances(10_000):
        assert list(group(t, S).members) == algorithm_2(t, S)


def test_prefix_is_its_definition() -> None:
    for t, S in instances(10_000):
        assert list(group(t, S, strategy="prefix").members) == best_prefix(t, S)


@settings(max_examples=300)
@given(*small)
def test_greedy_is_algorithm_2_where_ties_are_many(n: int, d: int, seed: int) -> None:
    t, S = integers(n, d, seed)
    assert list(group(t, S).members) == algorithm_2(t, S)
    assert list(group(t, S, strategy="prefix").members) == best_prefix(t, S)


def test_greedy_is_algorithm_2_when_many_candidates_are_left() -> None:
    """So many that candidates are decided in blocks of several sizes."""
    draw = np.random.default_rng(0)
    for common in (0.0, 0.1, 0.3):
        t = draw.normal(size=20)
        S = draw.normal(size=(150, 20)) * draw.lognormal(size=(150, 1)) + common * t
        found = group(t, S)
        assert list(found.members) == algorithm_2(t, S)
        assert len(found.members) < 50
        assert list(group(t, S, strategy="prefix").members) == best_prefix(t, S)


def test_exact_is_the_optimum() -> None:
    for number, (t, S) in enumerate(instances(300)):
        trade_off, max_size = (1.0, 0.0, 0.5, 20.0)[number % 4], (12, 3, 12, 1, 12)[number % 5]
        found = group(t, S, strategy="exact", trade_off=trade_off, max_size=max_size)
        assert list(found.members) == optimum(t, S, trade_off, max_size)


def test_exact_prefers_the_smallest_then_the_first_of_equal_groups() -> None:
    t = np.ones(1)
    assert group(t, np.zeros((5, 1)), strategy="exact").members == ()
    assert group(t, np.ones((5, 1)), strategy="exact").members == (0, 1)  # TS 1, KC 1; all larger groups have that too
    two = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    assert group(np.ones(2), two, strategy="exact").members == (0, 2)


def test_exact_refuses_more_candidates_than_it_can_decide() -> None:
    t, S = normal(EXACT_LIMIT + 1, 3, 0)
    with pytest.raises(ValueError, match="greedy"):
        group(t, S, strategy="exact")
    assert group(t, S, strategy="exact", where=np.arange(EXACT_LIMIT + 1) < 5).trace_total == 5


@settings(max_examples=50)
@given(
    *small,
    st.floats(0, 10),
    st.none() | st.integers(0, 6),
    st.none() | st.floats(-2, 2),
)
def test_no_strategy_beats_exact(
    n: int, d: int, seed: int, trade_off: float, max_size: int | None, min_similarity: float | None
) -> None:
    for t, S in (normal(n, d, seed), integers(n, d, seed)):
        bounds: dict[str, Any] = {"max_size": max_size, "min_similarity": min_similarity}
        best = group(t, S, strategy="exact", trade_off=trade_off, **bounds).objective
        assert best >= 0
        for strategy in STRATEGIES:
            if strategy == "top-k" and max_size is None:
                continue
            found = group(t, S, strategy=strategy, **bounds)
            assert found.target_similarity + trade_off * found.knowledge_consistency <= best + 1e-9


def test_knowledge_consistency_is_the_best_pair_or_nothing() -> None:
    for t, S in instances(600):
        found = group(t, S, strategy="knowledge-consistency")
        subsets = [S[[*subset]] for size in (2, 3, 4) for subset in combinations(range(len(S)), size)]
        best = max([0.0, *(KC(list(subset)) for subset in subsets)])
        assert found.knowledge_consistency == pytest.approx(best, abs=1e-9)
        assert len(found.members) in (0, 2)


def test_of_equal_pairs_the_first_in_the_ranking_is_taken() -> None:
    S = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    assert group(np.array([1.0, 2.0]), S, strategy="knowledge-consistency").members == (1, 2)
    assert group(np.array([2.0, 1.0]), S, strategy="knowledge-consistency").members == (0, 3)
    copies = np.tile(np.array([0.3, 0.1, 0.7], dtype=np.float32), (600, 1))
    assert group(copies[0], copies, strategy="knowledge-consistency").members == (0, 1)


def test_knowledge_consistency_looks_at_all_pairs_of_a_large_pool() -> None:
    t, S = normal(900, 4, 3)
    gram = np.triu(S @ S.T, k=1)
    pair = set(np.unravel_index(gram.argmax(), gram.shape))
    assert set(group(t, S, strategy="knowledge-consistency").members) == pair
    with pytest.raises(ValueError, match="greedy"):
        group(t, np.zeros((PAIRS_LIMIT + 1, 4)), strategy="knowledge-consistency")


@given(*small)
def test_the_other_strategies_are_what_their_names_say(n: int, d: int, seed: int) -> None:
    for t, S in (normal(n, d, seed), integers(n, d, seed)):
        ranked = ranking(t, S)
        assert list(group(t, S, strategy="all").members) == ranked
        assert list(group(t, S, strategy="top-k", max_size=3).members) == ranked[:3]
        positive = [i for i in ranked if sim(t, S[i]) >= 0]
        assert list(group(t, S, strategy="target-similarity").members) == positive


# What holds for every strategy.


def each(t: Any, S: Any, **options: Any) -> Iterator[tuple[str, Grouping]]:
    for strategy in STRATEGIES:
        sizes = {"max_size": 4} if strategy == "top-k" else {}
        yield strategy, group(t, S, strategy=strategy, **sizes | options)


@settings(max_examples=50)
@given(*small)
def test_figures_are_the_definitions(n: int, d: int, seed: int) -> None:
    for t, S in (normal(n, d, seed), integers(n, d, seed)):
        for _, found in each(t, S):
            members = [S[i] for i in found.members]
            assert found.target_similarity == pytest.approx(TS(members, t), abs=1e-12)
            assert found.knowledge_consistency == pytest.approx(KC(members), abs=1e-11)
            assert found.knowledge_consistency == pytest.approx(
                knowledge_consistency(S[list(found.members)]), abs=1e-11
            )
            assert found.objective == pytest.approx(TS(members, t) + KC(members), abs=1e-11)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_torch_decides_as_numpy_does(dtype: Any) -> None:
    torch = pytest.importorskip("torch")
    for t, S in instances(300, dtype):
        theirs = dict(each(torch.from_numpy(t), torch.from_numpy(S)))
        for strategy, ours in each(t, S):
            assert ours.members == theirs[strategy].members
            for one, other in zip(ours.trace, theirs[strategy].trace, strict=True):
                assert (one.index, one.rank, one.taken, one.reason) == (
                    other.index,
                    other.rank,
                    other.taken,
                    other.reason,
                )
                close: Callable[[float], Any] = lambda x: pytest.approx(x, rel=1e-4, abs=1e-4)  # noqa: E731 # one line, used once
                assert one.similarity == close(other.similarity)
                assert one.consistency_before == close(other.consistency_before)
                assert one.consistency_after == close(other.consistency_after)


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_a_tie_in_float32_does_not_hang_on_rounding(seed: int) -> None:
    """Copies of one vector never lower KC nor raise it, whatever the rounding of their sums."""
    torch = pytest.importorskip("torch")
    t, S = normal(1, 40, seed, np.float32)
    S = np.repeat(S, 30, axis=0)
    helps = sim(t, S[0]) >= 0
    for arrays in ((t, S), (torch.from_numpy(t), torch.from_numpy(S))):
        assert group(*arrays).members == (tuple(range(30)) if helps else ())
        assert group(*arrays, strategy="prefix").members == ((0, 1) if helps else ())
        assert group(*arrays, strategy="knowledge-consistency").members == (0, 1)


@settings(max_examples=50)
@given(*small, st.randoms(use_true_random=False))
def test_the_order_of_the_candidates_does_not_matter(n: int, d: int, seed: int, random: Any) -> None:
    order = list(range(n))
    random.shuffle(order)
    ties = np.random.default_rng(seed).permutation(n)
    for t, S in (normal(n, d, seed, np.float32), integers(n, d, seed)):
        permuted = dict(each(t, S[order], tie_order=ties[order]))
        for strategy, found in each(t, S, tie_order=ties):
            assert tuple(order[i] for i in permuted[strategy].members) == found.members
            assert permuted[strategy].objective == found.objective
            moved = [order[decision.index] for decision in permuted[strategy].trace]
            assert moved == [decision.index for decision in found.trace]


@settings(max_examples=50)
@given(*small, st.floats(0, 3))
def test_the_trace_is_enough_to_compute_the_answer_again(n: int, d: int, seed: int, trade_off: float) -> None:
    for t, S in (normal(n, d, seed), integers(n, d, seed)):
        weighed = group(t, S, strategy="exact", trade_off=trade_off)
        for strategy, found, weight in (*((*one, 1) for one in each(t, S)), ("exact", weighed, trade_off)):
            taken = [decision for decision in found.trace if decision.taken]
            target_similarity = sum(d.similarity for d in taken) / len(taken) if taken else 0.0
            consistency = taken[-1].consistency_after if taken else 0.0
            assert tuple(decision.index for decision in taken) == found.members
            assert (target_similarity, consistency) == (found.target_similarity, found.knowledge_consistency)
            assert found.objective == target_similarity + weight * consistency

            assert [decision.index for decision in found.trace] == ranking(t, S)
            assert [decision.rank for decision in found.trace] == list(range(n))
            assert found.trace_total == n
            before: list[np.ndarray] = []
            for decision in found.trace:
                source = S[decision.index]
                assert decision.similarity == pytest.approx(sim(t, source), abs=1e-12)
                assert decision.consistency_before == pytest.approx(KC(before), abs=1e-11)
                assert decision.consistency_after == pytest.approx(KC([*before, source]), abs=1e-11)
                assert decision.taken == (decision.reason == "taken")
                if decision.taken or (strategy == "prefix" and decision.reason == "after-best-prefix"):
                    before.append(source)


def test_reasons() -> None:
    t = np.ones(2)
    S = np.array([[3.0, 0.0], [0.0, 2.0], [-2.5, 3.0], [1.0, -3.0]])

    def reasons(strategy: Any, **options: Any) -> list[str]:
        return [decision.reason for decision in group(t, S, strategy=strategy, **options).trace]

    assert reasons("greedy") == ["taken", "taken", "consistency-falls", "negative-similarity"]
    assert reasons("greedy", min_similarity=2) == ["taken", "taken", "below-min-similarity", "below-min-similarity"]
    assert reasons("greedy", max_size=1) == ["taken", "group-full", "group-full", "negative-similarity"]
    assert reasons("prefix") == ["taken", "after-best-prefix", "after-best-prefix", "negative-similarity"]
    assert reasons("prefix", max_size=2) == ["taken", "after-best-prefix", "group-full", "negative-similarity"]
    assert reasons("exact", trade_off=0) == ["taken", "not-in-optimum", "not-in-optimum", "not-in-optimum"]
    assert reasons("knowledge-consistency") == ["not-in-best-pair", "taken", "taken", "not-in-best-pair"]
    assert reasons("target-similarity") == ["taken", "taken", "taken", "negative-similarity"]
    assert reasons("top-k", max_size=1) == ["taken", "group-full", "group-full", "group-full"]
    assert reasons("all") == ["taken"] * 4


def test_a_group_worked_by_hand() -> None:
    t = np.array([1.0, 1.0])
    S = np.array([[3.0, 0.0], [0.0, 2.0], [2.0, 0.0], [-1.0, 0.0]])
    found = group(t, S)
    # Ranked 0 (3), 1 (2), 2 (2), 3 (-1): 0 starts, 1 leaves KC at 0, 2 lifts it to (0 + 6 + 0) / 3, 3 is negative.
    assert found.members == (0, 1, 2)
    assert [d.reason for d in found.trace] == ["taken", "taken", "taken", "negative-similarity"]
    assert (found.target_similarity, found.knowledge_consistency) == (pytest.approx(7 / 3), pytest.approx(2))
    assert found.objective == pytest.approx(13 / 3)
    # All three prefixes have a KC of 0, 0 and 2; the pair {0, 2} has TS 2.5 and KC 6.
    assert group(t, S, strategy="prefix").members == (0, 1, 2)
    best = group(t, S, strategy="exact", trade_off=0.5)
    assert (best.members, best.objective) == ((0, 2), pytest.approx(2.5 + 0.5 * 6))


def test_no_sources_and_no_helpful_sources_give_the_empty_group() -> None:
    t = np.ones(2)
    for S in (np.zeros((0, 2)), -np.ones((1, 2))):
        for strategy, found in each(t, S):
            if len(S) and strategy in ("all", "top-k"):
                continue
            assert (found.members, found.target_similarity, found.knowledge_consistency) == ((), 0, 0)
            assert found.objective == 0


# Options.


@settings(max_examples=50)
@given(*small, st.integers(0, 4), st.floats(-2, 2))
def test_size_and_similarity_bound_every_strategy(n: int, d: int, seed: int, max_size: int, least: float) -> None:
    t, S = normal(n, d, seed)
    for strategy, found in each(t, S, max_size=max_size):
        assert len(found.members) <= max_size
        if strategy in ("greedy", "top-k"):
            unbounded = group(t, S, strategy=strategy, max_size=n)
            assert found.members == unbounded.members[:max_size]
    passing = [i for i in range(n) if sim(t, S[i]) >= least]
    only_those = dict(each(t, S[passing], min_similarity=-np.inf))
    for strategy, found in each(t, S, min_similarity=least):
        assert found.members == tuple(passing[i] for i in only_those[strategy].members)
        below = {decision.index for decision in found.trace if decision.reason == "below-min-similarity"}
        assert below == set(range(n)) - set(passing)


@settings(max_examples=50)
@given(*small)
def test_where_names_the_sources_that_there_are(n: int, d: int, seed: int) -> None:
    t, S = normal(n, d, seed)
    where = np.random.default_rng(seed).random(n) < 0.6
    kept = np.flatnonzero(where)
    alone = dict(each(t, S[kept]))
    for strategy, found in each(t, S, where=where):
        assert found.members == tuple(kept[i] for i in alone[strategy].members)
        assert [decision.index for decision in found.trace] == [kept[d.index] for d in alone[strategy].trace]
        assert found.trace_total == len(kept)


def test_equal_similarities_rank_by_index_or_as_told() -> None:
    t, S = np.ones(1), np.array([[1.0], [2.0], [1.0], [1.0]])
    assert group(t, S, strategy="all").members == (1, 0, 2, 3)
    assert group(t, S, strategy="all", tie_order=[5, 9, 7, -1]).members == (1, 3, 0, 2)
    assert group(t, S, strategy="top-k", max_size=2, tie_order=[5, 9, 7, -1], where=S[:, 0] < 2).members == (3, 0)


@given(*small)
def test_ties_rank_in_their_order_wherever_they_stand(n: int, d: int, seed: int) -> None:
    t, S = integers(n, d, seed)
    order = np.random.default_rng(seed).permutation(n)
    expected = sorted(range(n), key=lambda i: (-sim(t, S[i]), order[i]))
    assert list(group(t, S, strategy="all", tie_order=order).members) == expected


@settings(max_examples=30)
@given(*small)
def test_similarities_may_be_given(n: int, d: int, seed: int) -> None:
    torch = pytest.importorskip("torch")
    t, S = integers(n, d, seed)
    for strategy, found in each(t, S, similarities=S @ t):
        assert found == dict(each(t, S))[strategy]
    other = np.random.default_rng(seed).normal(size=n)
    assert [d.similarity for d in group(t, S, similarities=other).trace] == sorted(other, reverse=True)
    there = group(torch.from_numpy(t), torch.from_numpy(S), similarities=torch.from_numpy(other))
    assert there.members == group(t, S, similarities=other).members


@settings(max_examples=50)
@given(*small, st.integers(0, 10))
def test_a_cut_trace_lists_what_was_taken_and_the_first_others(n: int, d: int, seed: int, size: int) -> None:
    t, S = normal(n, d, seed)
    whole = dict(each(t, S))
    for strategy, found in each(t, S, trace_size=size):
        full = whole[strategy]
        assert (found.members, found.objective, found.trace_total) == (full.members, full.objective, n)
        others = [decision for decision in full.trace if not decision.taken][: max(0, size - len(full.members))]
        listed = {decision.rank for decision in others} | {d.rank for d in full.trace if d.taken}
        assert found.trace == tuple(decision for decision in full.trace if decision.rank in listed)


def test_a_read_only_memory_map_is_as_good(tmp_path: Any) -> None:
    t, S = normal(300, 8, 1, np.float32)
    S.tofile(tmp_path / "pool")
    pool = np.memmap(tmp_path / "pool", dtype=np.float32, mode="r", shape=(300, 8))
    assert group(t, pool, max_size=5, trace_size=10) == group(t, S, max_size=5, trace_size=10)


def test_bad_options_are_refused() -> None:
    t, S = np.ones(2), np.ones((3, 2))
    bad: list[tuple[dict[str, Any], str]] = [
        ({"strategy": "best"}, "best"),
        ({"trade_off": 1.0}, "exact"),
        ({"strategy": "exact", "trade_off": -1.0}, "at least 0"),
        ({"strategy": "top-k"}, "max_size"),
        ({"max_size": -1}, "max_size"),
        ({"trace_size": -1}, "trace_size"),
        ({"similarities": np.ones(2)}, "similarities"),
        ({"similarities": np.array([1, np.nan, 1])}, "source 1 is nan"),
        ({"where": [True]}, "where"),
        ({"tie_order": [1, 2, 3, 4]}, "tie_order"),
    ]
    for options, message in bad:
        with pytest.raises(ValueError, match=message):
            group(t, S, **options)
    with pytest.raises(ValueError, match=r"\(n, d\)"):
        group(np.ones(3), S)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_products_that_overflow_are_refused(strategy: Any) -> None:
    torch = pytest.importorskip("torch")
    S = np.full((3, 4), 1e30, dtype=np.float32)
    for t in (S[0], np.full(4, 1e-3, dtype=np.float32)):
        for arrays in ((t, S), (torch.from_numpy(t), torch.from_numpy(S))):
            with pytest.raises(ValueError, match=r"finite|range of their dtype"):
                group(*arrays, strategy=strategy, max_size=2)


def test_torch_in_half_precision_and_with_gradients() -> None:
    torch = pytest.importorskip("torch")
    t, S = integers(6, 4, 3)
    ours = group(t, S)
    for dtype in (torch.bfloat16, torch.float16):
        assert group(torch.tensor(t, dtype=dtype), torch.tensor(S, dtype=dtype)).members == ours.members
    assert group(torch.nn.Parameter(torch.tensor(t)), torch.nn.Parameter(torch.tensor(S))).members == ours.members
