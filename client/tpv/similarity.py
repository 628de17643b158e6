"""How similar two tasks are, from their task prompt vectors; on arrays of any library (NumPy, torch)."""

from __future__ import annotations

from typing import Any, Literal

from array_api_compat import array_namespace

Array = Any  #: an array of a library of the array API standard

Metric = Literal["dot"]


def pool(vectors: Array) -> Array:
    """The mean over the token rows: (r, d) gives (d,), a batch (n, r, d) gives (n, d)."""
    return array_namespace(vectors).mean(vectors, axis=-2)


def similarity(a: Array, b: Array, metric: Metric = "dot") -> Array:
    """Similarities of vectors (r, d) or of batches (n, r, d).

    `result[i, j]` compares the i-th of `a` with the j-th of `b`; the axis of a single vector is left out, so two
    single vectors give a scalar array. The metric `dot` is Eq. 2 of Dynamic Task Vector Grouping
    (https://arxiv.org/abs/2503.18063): (1/r^2) (sum of a's rows) . (sum of b's rows), a product of pooled vectors.
    """
    if metric != "dot":
        raise ValueError(f"unknown metric {metric!r}: use 'dot'")
    return dot(pool(a), pool(b))


def dot(a: Array, b: Array) -> Array:
    """Eq. 2 on pooled vectors: (d,) or (n, d) against (d,) or (m, d)."""
    xp = array_namespace(a, b)
    return xp.matmul(a, b if b.ndim == 1 else xp.permute_dims(b, (1, 0)))
