"""How similar two tasks are, from their task prompt vectors; on arrays of any library (NumPy, torch).

| metric | compares | source |
|---|---|---|
| `dot` | pooled vectors, by their product | Eq. 2 of Dynamic Task Vector Grouping, https://arxiv.org/abs/2503.18063 |
| `cosine` | pooled vectors, by their angle | |
| `dot-centered`, `cosine-centered` | pooled vectors less a reference pool's centre | ours: see `dot_centered` |
| `cosine-flat` | all r * d weights | Task Prompt Vectors, https://arxiv.org/abs/2408.01119 |
| `cosine-prompt` | pooled soft prompts P_init + T | SPoT, https://arxiv.org/abs/2110.07904 |

A cosine with a vector of zeros is 0. Each metric is symmetric. One vector against many takes one product a row, so the
value of a row does not depend on the rows around it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

from array_api_compat import array_namespace

Array = Any  #: an array of a library of the array API standard

Metric = Literal["dot", "cosine", "dot-centered", "cosine-centered", "cosine-flat", "cosine-prompt"]
METRICS: tuple[Metric, ...] = get_args(Metric)

BLOCK = 1024  #: rows compared with one vector at a time: what a metric subtracts from them stays in the cache


def pool(vectors: Array) -> Array:
    """The mean over the token rows: (r, d) gives (d,), a batch (n, r, d) gives (n, d)."""
    return array_namespace(vectors).mean(vectors, axis=-2)


def similarity(
    a: Array, b: Array, metric: Metric = "dot", *, center: Array | None = None, initialization: Array | None = None
) -> Array:
    """Similarities of vectors T (r, d) or of batches (n, r, d), all of one float dtype.

    `result[i, j]` compares the i-th of `a` with the j-th of `b`; the axis of a single vector is left out, so two
    single vectors give a scalar array. `center` (d,) is the mean pooled vector of the reference pool, which the
    centred metrics need; `initialization` P_init (r, d) is what `cosine-prompt` needs. Raises ValueError for an unknown
    metric, and for one of these two that is missing or superfluous.
    """
    _check(metric, center, initialization)
    if metric == "cosine-flat":
        return cosine_flat(a, b)
    start = None if initialization is None else pool(initialization)
    return pooled_similarity(pool(a), pool(b), metric, center=center, initialization=start)


def pooled_similarity(
    a: Array, b: Array, metric: Metric = "dot", *, center: Array | None = None, initialization: Array | None = None
) -> Array:
    """`similarity` of vectors that are pooled already: (d,) or (n, d), with `initialization` the pooled P_init (d,).

    `cosine-flat` needs the whole vectors and raises ValueError.
    """
    _check(metric, center, initialization)
    if metric == "cosine-flat":
        raise ValueError("the metric 'cosine-flat' compares all r * d weights: pooled vectors do not have them")
    compare: dict[Metric, Callable[[Array, Array], Array]] = {
        "dot": dot,
        "cosine": cosine,
        "dot-centered": lambda a, b: dot_centered(a, b, center),
        "cosine-centered": lambda a, b: cosine_centered(a, b, center),
        "cosine-prompt": lambda a, b: cosine_prompt(a, b, initialization),
    }
    if a.ndim < b.ndim:
        a, b = b, a
    if a.ndim == b.ndim or a.shape[0] <= BLOCK:
        return compare[metric](a, b)
    blocks = [compare[metric](a[first : first + BLOCK, :], b) for first in range(0, a.shape[0], BLOCK)]
    return array_namespace(a, b).concat(blocks)


def dot(a: Array, b: Array) -> Array:
    """Eq. 2 on pooled vectors, (d,) or (n, d) against (d,) or (m, d): (1/r^2) (sum of a's rows) . (sum of b's rows)."""
    xp = array_namespace(a, b)
    if a.ndim == b.ndim == 2:
        return xp.matmul(a, xp.permute_dims(b, (1, 0)))
    return xp.vecdot(a, b)  # not matmul, whose rounding of a row may depend on its place


def cosine(a: Array, b: Array) -> Array:
    """The cosine of the angle between pooled vectors, -1 to 1; 0 with a vector of zeros."""
    xp = array_namespace(a, b)
    a, b = _with_largest_one(a), _with_largest_one(b)
    norms_a, norms_b = (xp.sqrt(xp.vecdot(x, x)) for x in (a, b))
    norms = norms_a[:, None] * norms_b if a.ndim == b.ndim == 2 else norms_a * norms_b
    values = dot(a, b) / xp.where(norms > 0, norms, xp.ones_like(norms))
    return xp.clip(values, -1, 1)  # rounding may leave the interval


def dot_centered(a: Array, b: Array, center: Array) -> Array:
    """`dot` of what sets the tasks apart: both sides less the mean pooled vector of a reference pool, (d,).

    TPVs of one model have a large part in common, which hides that tasks are unrelated or contrary; without it, the
    sign speaks. The pool should be much larger than what is compared: centring n vectors on their own mean pushes their
    average cosine to -1/(n - 1).
    """
    return dot(a - center, b - center)


def cosine_centered(a: Array, b: Array, center: Array) -> Array:
    """`cosine` of what sets the tasks apart; see `dot_centered`."""
    return cosine(a - center, b - center)


def cosine_prompt(a: Array, b: Array, initialization: Array) -> Array:
    """`cosine` of the pooled soft prompts P_init + T, which SPoT compares; `initialization` is the pooled P_init, (d,).

    SPoT: https://arxiv.org/abs/2110.07904, Section 3.
    """
    return cosine(a + initialization, b + initialization)


def cosine_flat(a: Array, b: Array) -> Array:
    """The cosine over all r * d weights of vectors (r, d) or batches (n, r, d), as in Task Prompt Vectors."""
    xp = array_namespace(a, b)
    return cosine(*(xp.reshape(x, (*x.shape[:-2], x.shape[-2] * x.shape[-1])) for x in (a, b)))


def _with_largest_one(vectors: Array) -> Array:
    """Vectors (n, d) or (d,) scaled to a largest number of 1 or -1, so that no square overflows or vanishes."""
    xp = array_namespace(vectors)
    largest = xp.max(xp.abs(vectors), axis=-1, keepdims=True)
    return vectors / xp.where(largest > 0, largest, xp.ones_like(largest))


def _check(metric: Metric, center: Array | None, initialization: Array | None) -> None:
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}: use one of {', '.join(METRICS)}")
    for name, value, needed, what in (
        ("center", center, metric.endswith("-centered"), "the mean pooled vector of the reference pool"),
        ("initialization", initialization, metric == "cosine-prompt", "the soft prompt that tuning started from"),
    ):
        if needed and value is None:
            raise ValueError(f"the metric {metric!r} needs `{name}`, {what}")
        if value is not None and not needed:
            raise ValueError(f"the metric {metric!r} takes no `{name}`")
