"""One vector made of several: weighted sums of task prompt vectors, and what merges them with less interference.

All methods take vectors (n, r, d) and weights (n,) and compute in float64. Terms are added by size, so neither the
order of the vectors nor the machine changes a bit of the result: the same combination has the same fingerprint.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tpv import files
from tpv.vectors import Float32, as_prompt

Float64 = NDArray[np.float64]

MergeMethod = Literal["sum", "mean", "ties", "dare"]
METHODS: tuple[MergeMethod, ...] = get_args(MergeMethod)


def merge(
    vectors: ArrayLike,
    weights: ArrayLike,
    method: MergeMethod = "sum",
    *,
    density: float | None = None,
    drop: float | None = None,
    seed: int | None = None,
) -> Float32:
    """Merges vectors (n, r, d) of one initialization with signed weights (n,) into one, float32 (r, d).

    `ties` needs `density`; `dare` needs `drop` and `seed`. Raises ValueError for shapes, weights and options that do
    not fit, and InvalidTensor for a result that is not finite in float32.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: use one of {', '.join(METHODS)}")
    for name, value, needed in (
        ("density", density, method == "ties"),
        ("drop", drop, method == "dare"),
        ("seed", seed, method == "dare"),
    ):
        if (value is not None) != needed:
            raise ValueError(f"the method {method!r} {'needs' if needed else 'takes no'} `{name}`")
    T, w = np.asarray(vectors), np.asarray(weights, dtype=np.float64)
    if T.ndim != 3 or 0 in T.shape:
        raise ValueError(f"the vectors have shape {list(T.shape)}: give (n, num_virtual_tokens, token_dim)")
    if w.shape != T.shape[:1]:
        raise ValueError(f"there are {len(T)} vectors, and weights of shape {list(w.shape)}: give one for each")
    if not (np.isfinite(T).all() and np.isfinite(w).all()):
        raise ValueError("vectors and weights are finite numbers: here one is NaN or infinite")
    if method == "ties" and density is not None:
        merged = ties(T, w, density=density)
    elif method == "dare" and drop is not None and seed is not None:
        merged = dare(T, w, drop=drop, seed=seed)
    else:
        merged = mean(T, w) if method == "mean" else weighted_sum(T, w)
    return as_prompt(merged, "merged vector")


def weighted_sum(vectors: NDArray[Any], weights: Float64) -> Float64:
    """sum of w_i T_i: Task Arithmetic, https://arxiv.org/abs/2212.04089."""
    return _sum(_terms(vectors, weights))


def mean(vectors: NDArray[Any], weights: Float64) -> Float64:
    """The weighted sum over the sum of the weights: with equal ones, Model Soups, https://arxiv.org/abs/2203.05482.

    Raises ValueError for weights that do not sum to more than 0: divided by that, every sign would turn.
    """
    total = float(_sum(weights))
    if total <= 1e-9 * np.abs(weights).sum():  # rounding of what cancels
        raise ValueError(f"the weights sum to {round(total, 9):g}, and a mean needs more than 0: use the method 'sum'")
    return weighted_sum(vectors, weights) / total


def ties(vectors: NDArray[Any], weights: Float64, *, density: float) -> Float64:
    """TIES-Merging, https://arxiv.org/abs/2306.01708: trim, elect signs, mean of those that agree.

    Of each vector the share `density`, 0 < density <= 1, of its r * d values stays, the largest by magnitude (of equal
    ones the first). A place's sign is that of the sum of what stayed there, plus for 0. Its value is the sum of the
    values with that sign, each times its weight, over their number. With positive weights that is
    `peft.utils.merge_utils.ties`; unlike there, a negative weight negates its vector before signs are elected, and a
    vector with weight 0 takes no part. The weights scale what is a mean already: equal ones are 1, not 1 / n.

    Raises ValueError for a density at which no value stays.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}: it is the share of values that stay, above 0 and at most 1")
    trimmed = _terms(vectors, np.sign(weights))
    kept = int(density * trimmed[0].size)
    if kept == 0:
        raise ValueError(f"density is {density}: of {trimmed[0].size} values none would stay, so that all become 0")
    for values in trimmed.reshape(len(trimmed), -1):
        values[np.argsort(-np.abs(values), kind="stable")[kept:]] = 0
    elected = np.where(_sum(trimmed) >= 0, 1, -1)
    agreeing = np.sign(trimmed) == elected
    merged = _sum(_terms(trimmed, np.abs(weights)) * agreeing)
    return np.asarray(merged / np.maximum(agreeing.sum(axis=0), 1))


def dare(vectors: NDArray[Any], weights: Float64, *, drop: float, seed: int) -> Float64:
    """DARE, https://arxiv.org/abs/2311.03099: drop values at random, rescale the others, weighted sum.

    Each value becomes 0 with probability `drop`, 0 <= drop < 1; the others are divided by 1 - drop, which keeps the
    expectation. The draw for a vector is `Generator(PCG64([seed, f])).random((r, d)) < drop`, where f is the vector's
    fingerprint as a number: the other vectors and their order do not matter, and equal vectors lose the same values.
    """
    if not 0 <= drop < 1:
        raise ValueError(f"drop is {drop}: it is the probability that a value is dropped, at least 0 and below 1")
    if seed < 0:
        raise ValueError(f"seed is {seed}: it is a whole number of at least 0")
    kept = np.stack([_draw(T, seed) >= drop for T in vectors])
    return _sum(_terms(vectors, weights) * kept / (1 - drop))


def _draw(vector: NDArray[Any], seed: int) -> Float64:
    """Uniform numbers in [0, 1) that belong to this seed and this vector."""
    fingerprint = int(files.fingerprint(vector).removeprefix("sha256:"), 16)
    return np.random.Generator(np.random.PCG64([seed, fingerprint])).random(vector.shape)


def _terms(vectors: NDArray[Any], weights: Float64) -> Float64:
    """w_i T_i, (n, r, d)."""
    return vectors * weights[:, None, None]


def _sum(terms: Float64) -> Float64:
    """The sum over the first axis, in the order of the values."""
    return np.asarray(np.sort(terms, axis=0).sum(axis=0))
