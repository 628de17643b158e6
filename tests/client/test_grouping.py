from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpv.grouping import Grouping, group, knowledge_consistency

small = st.integers(0, 9), st.integers(1, 5), st.integers(0, 2**32 - 1)


def sim(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b)


def KC(sources: list[np.ndarray]) -> float:  # noqa: N802 # Eq. 4
    pairs = [sim(a, b) for a, b in combinations(sources, 2)]
    return sum(pairs) / len(pairs) if pairs else 0.0


def algorithm_2(t: np.ndarray, S: np.ndarray) -> list[int]:
    """Algorithm 2 of the paper, line by line, with the tie rule that rounding asks for."""
    ranking = sorted(range(len(S)), key=lambda i: (-sim(t, S[i]), i))
    group: list[int] = []
    for i in ranking:
        scale = max(sim(S[j], S[j]) for j in [*group, i])
        contribution = KC([S[j] for j in [*group, i]]) - KC([S[j] for j in group])
        if sim(t, S[i]) >= 0 and contribution >= -16 * np.finfo(S.dtype).eps * scale:
            group.append(i)
    return group


def instance(n: int, d: int, seed: int, dtype: Any = np.float64) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    return draw.normal(size=d).astype(dtype), draw.normal(size=(n, d)).astype(dtype)


def integers(n: int, d: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Small whole numbers, so that sums are exact and ties are many."""
    draw = np.random.default_rng(seed)
    return draw.integers(-2, 3, d).astype(float), draw.integers(-2, 3, (n, d)).astype(float)


@settings(max_examples=300)
@given(*small)
def test_greedy_is_algorithm_2(n: int, d: int, seed: int) -> None:
    t, S = instance(n, d, seed)
    assert list(group(t, S).members) == algorithm_2(t, S)


@settings(max_examples=300)
@given(*small)
def test_greedy_is_algorithm_2_where_ties_are_many(n: int, d: int, seed: int) -> None:
    t, S = integers(n, d, seed)
    assert list(group(t, S).members) == algorithm_2(t, S)


@given(*small)
def test_its_figures_are_the_definitions(n: int, d: int, seed: int) -> None:
    t, S = instance(n, d, seed)
    found = group(t, S)
    members = [S[i] for i in found.members]
    target_similarity = float(np.mean([sim(s, t) for s in members])) if members else 0.0  # Eq. 3
    assert found.target_similarity == pytest.approx(target_similarity, abs=1e-12)
    assert found.knowledge_consistency == pytest.approx(KC(members), abs=1e-12)
    assert found.knowledge_consistency == pytest.approx(knowledge_consistency(S[list(found.members)]), abs=1e-12)
    assert found.objective == pytest.approx(target_similarity + KC(members), abs=1e-12)  # Eq. 5


@given(*small)
def test_torch_finds_the_same_members(n: int, d: int, seed: int) -> None:
    torch = pytest.importorskip("torch")
    for t, S in (instance(n, d, seed), integers(n, d, seed)):
        ours, theirs = group(t, S), group(torch.from_numpy(t), torch.from_numpy(S))
        assert ours.members == theirs.members
        assert [d.reason for d in ours.trace] == [d.reason for d in theirs.trace]
        assert ours.objective == pytest.approx(theirs.objective, abs=1e-10)


@given(st.integers(0, 2**32 - 1))
def test_a_tie_in_float32_does_not_hang_on_rounding(seed: int) -> None:
    """Copies of one vector never lower KC, whatever the rounding of their sums.

    Only which of them are taken is certain: a matrix product may round equal rows differently, so their order is not.
    """
    torch = pytest.importorskip("torch")
    t, S = instance(1, 40, seed, np.float32)
    S = np.repeat(S, 30, axis=0)
    members = set(range(30)) if sim(t, S[0]) >= 0 else set()
    assert set(group(t, S).members) == members
    assert set(group(torch.from_numpy(t), torch.from_numpy(S)).members) == members


@given(*small, st.randoms(use_true_random=False))
def test_the_order_of_the_candidates_does_not_matter(n: int, d: int, seed: int, random: Any) -> None:
    t, S = instance(n, d, seed)
    order = list(range(n))
    random.shuffle(order)
    permuted = group(t, S[order])
    assert [order[i] for i in permuted.members] == list(group(t, S).members)
    assert permuted.objective == pytest.approx(group(t, S).objective, abs=1e-12)


def recomputed(found: Grouping) -> tuple[tuple[int, ...], float, float]:
    """Members, TS and KC from the trace alone."""
    taken = [decision for decision in found.trace if decision.taken]
    mean = float(np.mean([decision.similarity for decision in taken])) if taken else 0.0
    return tuple(d.index for d in taken), mean, taken[-1].consistency_after if taken else 0.0


@given(*small)
def test_the_trace_is_enough_to_compute_the_answer_again(n: int, d: int, seed: int) -> None:
    t, S = instance(n, d, seed)
    found = group(t, S)
    members, target_similarity, consistency = recomputed(found)
    assert members == found.members
    assert target_similarity == pytest.approx(found.target_similarity)
    assert consistency == pytest.approx(found.knowledge_consistency)
    assert [decision.rank for decision in found.trace] == list(range(n))
    assert sorted(decision.index for decision in found.trace) == list(range(n))
    consistency = 0.0
    for decision in found.trace:
        assert decision.similarity == pytest.approx(sim(t, S[decision.index]))
        assert decision.consistency_before == consistency
        assert decision.taken == (decision.reason == "taken")
        if decision.taken:
            consistency = decision.consistency_after


def test_a_group_worked_by_hand() -> None:
    t = np.array([1.0, 1.0])
    S = np.array([[3.0, 0.0], [0.0, 2.0], [2.0, 0.0], [-1.0, 0.0]])
    found = group(t, S)
    # Ranked 0 (3), 1 (2), 2 (2), 3 (-1): 0 starts, 1 leaves KC at 0, 2 lifts it to (0 + 6 + 0) / 3, 3 is negative.
    assert found.members == (0, 1, 2)
    assert [d.reason for d in found.trace] == ["taken", "taken", "taken", "negative-similarity"]
    assert (found.target_similarity, found.knowledge_consistency) == (pytest.approx(7 / 3), pytest.approx(2))
    assert found.objective == pytest.approx(13 / 3)


def test_a_source_that_lowers_the_consistency_is_left() -> None:
    found = group(np.array([1.0, 1.0]), np.array([[3.0, 0.0], [3.0, -1.0], [-1.0, 2.0]]))
    assert found.members == (0, 1)
    assert found.trace[2].reason == "consistency-falls"


def test_equal_similarities_rank_by_input_index() -> None:
    assert group(np.array([1.0]), np.array([[1.0], [1.0], [1.0]])).members == (0, 1, 2)


def test_size_and_similarity_can_be_bounded() -> None:
    t, S = np.array([1.0]), np.array([[3.0], [2.0], [1.0], [-1.0]])
    assert group(t, S, max_size=2).members == (0, 1)
    assert group(t, S, max_size=2).trace[2].reason == "group-full"
    assert group(t, S, max_size=0).members == ()
    assert group(t, S, min_similarity=3).members == (0,)
    assert group(t, S, min_similarity=3).trace[1].reason == "below-min-similarity"


def test_no_sources_and_no_helpful_sources_give_the_empty_group() -> None:
    for S in (np.zeros((0, 2)), np.array([[-1.0, -1.0]])):
        found = group(np.array([1.0, 1.0]), S)
        assert (found.members, found.target_similarity, found.knowledge_consistency, found.objective) == ((), 0, 0, 0)


def test_an_unknown_strategy_is_refused() -> None:
    with pytest.raises(ValueError, match="best"):
        group(np.ones(1), np.ones((1, 1)), strategy="best")  # type: ignore[arg-type]
