from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpv.errors import InvalidTensor
from tpv.merging import METHODS, merge

OPTIONS: dict[str, dict[str, Any]] = {"ties": {"density": 0.4}, "dare": {"drop": 0.3, "seed": 7}}
seeds = st.integers(0, 2**32 - 1)


def vectors(n: int, seed: int, shape: tuple[int, int] = (5, 8)) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, *shape)).astype(np.float32)


def all_methods(T: Any, weights: Any) -> dict[str, np.ndarray]:
    return {method: merge(T, weights, method, **OPTIONS.get(method, {})) for method in METHODS}


def test_values_worked_by_hand() -> None:
    T = np.array([[[4.0, -1.0, 2.0, 0.5]], [[-1.0, -3.0, 3.0, 0.25]], [[2.0, 5.0, 0.0, -0.5]]])
    assert merge(T, [1, 2, -1]).tolist() == [[0, -12, 8, 1.5]]
    assert merge(T, [1, 2, 1], "mean").tolist() == [[1, -0.5, 2, 0.125]]
    # Half of each stays: (4, 0, 2, 0), (0, -3, 3, 0), (2, 5, 0, 0). Signs: +, +, +, +.
    assert merge(T, [1, 1, 1], "ties", density=0.5).tolist() == [[3, 5, 2.5, 0]]
    assert merge(T, [1, 2, 1], "ties", density=0.5).tolist() == [[3, 5, 4, 0]]
    assert merge(T, [1, 0, 0], "ties", density=0.5).tolist() == [[4, 0, 2, 0]]
    # The third negated: (-2, -5, 0, 0), so that the second place becomes negative.
    assert merge(T, [1, 1, -1], "ties", density=0.5).tolist() == [[4, -4, 2.5, 0]]


@given(st.integers(1, 6), seeds)
def test_the_sum_is_the_sum(n: int, seed: int) -> None:
    T, w = vectors(n, seed), np.random.default_rng(seed).normal(size=n)
    found = merge(T, w)
    assert (found.shape, found.dtype) == ((5, 8), np.float32)
    np.testing.assert_allclose(found, sum(w[i] * T[i].astype(float) for i in range(n)), rtol=1e-6, atol=1e-6)


@given(st.integers(1, 6), seeds, st.randoms(use_true_random=False))
def test_no_bit_depends_on_the_order_of_the_vectors(n: int, seed: int, random: Any) -> None:
    T, w = vectors(n, seed), np.random.default_rng(seed).normal(size=n) + 3
    T[-1] = T[0]
    order = list(range(n))
    random.shuffle(order)
    for method, found in all_methods(T, w).items():
        assert found.tobytes() == all_methods(T[order], w[order])[method].tobytes()


@given(st.integers(1, 6), seeds)
def test_copies_and_single_vectors(n: int, seed: int) -> None:
    T = vectors(1, seed)
    copies, ones = np.repeat(T, n, axis=0), np.ones(n)
    np.testing.assert_allclose(merge(copies, ones, "mean"), T[0], rtol=1e-6)
    np.testing.assert_allclose(merge(copies, ones, "ties", density=1), T[0], rtol=1e-6)
    np.testing.assert_array_equal(merge(copies, ones, "dare", drop=0, seed=1), merge(copies, ones))


@given(st.integers(1, 6), seeds)
def test_negated_weights_negate(n: int, seed: int) -> None:
    """Unlearning is adding with the other sign, for every method that takes only such weights."""
    T, w = vectors(n, seed), np.random.default_rng(seed).normal(size=n) + 3
    for method in METHODS:
        options = OPTIONS.get(method, {})
        if method == "mean":  # which would be the same mean
            with pytest.raises(ValueError, match="a mean needs more than 0"):
                merge(T, -np.abs(w), "mean")
        else:
            np.testing.assert_allclose(merge(T, -w, method, **options), -merge(T, w, method, **options), atol=1e-6)


@given(st.integers(1, 5), seeds, st.floats(0.05, 1, exclude_max=True))
def test_ties_is_what_peft_computes(n: int, seed: int, density: float) -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft.utils.merge_utils")
    T, w = vectors(n, seed), np.random.default_rng(seed).uniform(0.1, 2, n)
    theirs = peft.ties([torch.from_numpy(vector) for vector in T], torch.from_numpy(w), density)
    np.testing.assert_allclose(merge(T, w, "ties", density=density), theirs.numpy(), rtol=1e-5, atol=1e-5)


def test_unlike_in_peft_weights_take_part_in_the_election() -> None:
    T = np.array([[[1.0]], [[-3.0]]])
    assert merge(T, [1, -1], "ties", density=1).tolist() == [[2]]  # of 1 and 3; in PEFT -3 is elected, and negated
    assert merge(T, [1, 0], "ties", density=1).tolist() == [[1]]  # in PEFT -3 is elected, and counts nothing


def test_what_cancels_counts_as_positive_as_in_peft() -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft.utils.merge_utils")
    T = np.array([[[1.0, -2.0]], [[-1.0, 2.0]]])
    theirs = peft.ties([torch.from_numpy(vector) for vector in T], torch.ones(2), 0.99)
    assert merge(T, [1, 1], "ties", density=0.99).tolist() == theirs.tolist() == [[0, 2]]


@given(st.integers(1, 5), seeds, st.floats(0, 0.9))
def test_dare_drops_and_rescales_and_the_rest_is_the_sum_of_peft(n: int, seed: int, drop: float) -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft.utils.merge_utils")
    T, w = vectors(n, seed), np.random.default_rng(seed).normal(size=n)
    pruned = [merge(T[i : i + 1], [1], "dare", drop=drop, seed=seed) for i in range(n)]
    for vector, dropped in zip(T, pruned, strict=True):
        np.testing.assert_allclose(dropped[dropped != 0], (vector / (1 - drop))[dropped != 0], rtol=1e-6)
    theirs = peft.task_arithmetic([torch.from_numpy(vector.copy()) for vector in pruned], torch.from_numpy(w))
    np.testing.assert_allclose(merge(T, w, "dare", drop=drop, seed=seed), theirs.numpy(), rtol=1e-4, atol=1e-4)


def test_dare_drops_the_share_that_was_asked_for_and_keeps_the_expectation() -> None:
    T = np.ones((1, 200, 100), dtype=np.float32)
    found = merge(T, [1], "dare", drop=0.25, seed=3)
    assert (found == 0).mean() == pytest.approx(0.25, abs=0.01)
    assert found.mean() == pytest.approx(1, abs=0.02)


def test_a_seed_is_one_draw_on_every_machine() -> None:
    T = np.ones((1, 2, 8), dtype=np.float32)
    dropped = [(merge(T, [1], "dare", drop=0.5, seed=seed) == 0).astype(int).tolist() for seed in (0, 0, 1)]
    assert dropped[0] == dropped[1] != dropped[2]
    assert dropped[0] == [[0, 1, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 0, 1, 0]]


def test_what_does_not_fit_is_refused() -> None:
    T, w = vectors(2, 0), [1, 1]
    bad: list[tuple[Any, Any, dict[str, Any], str]] = [
        (T, w, {"method": "slerp"}, "ties"),
        (T, w, {"density": 0.5}, "takes no `density`"),
        (T, w, {"method": "ties"}, "needs `density`"),
        (T, w, {"method": "ties", "density": 0}, "above 0"),
        (T, w, {"method": "ties", "density": 1.5}, "at most 1"),
        (T, w, {"method": "ties", "density": 0.024}, "of 40 values none would stay"),
        (T, w, {"method": "dare", "drop": 0.5}, "needs `seed`"),
        (T, w, {"method": "dare", "seed": 1}, "needs `drop`"),
        (T, w, {"method": "dare", "drop": 1, "seed": 1}, "below 1"),
        (T, w, {"method": "dare", "drop": 0.5, "seed": -1}, "seed"),
        (T, w, {"method": "mean", "seed": 1}, "takes no `seed`"),
        (T, [0.1 + 0.2, -0.3], {"method": "mean"}, "sum to 0, and a mean needs more than 0"),
        (T, [1], {}, "2 vectors"),
        (T, [1, np.inf], {}, "finite"),
        (T * np.float32(np.nan), w, {"method": "ties", "density": 0.5}, "finite"),
        (T[0], w, {}, "shape"),
        (T[:0], [], {}, "shape"),
    ]
    for values, weights, options, message in bad:
        with pytest.raises(ValueError, match=message):
            merge(values, weights, **options)
    assert np.count_nonzero(merge(T[:1], [1], "ties", density=0.026)) == 1
    with pytest.raises(InvalidTensor, match="merged vector"):
        merge(T, [1e39, 1])
