from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tpv import similarity
from tpv.similarity import BLOCK, METRICS, pool, pooled_similarity

single = hnp.arrays(np.float64, (3, 4), elements=st.floats(-10, 10))
factors = st.floats(-10, 10)

CENTER = np.array([0.5, -1.0, 2.0, 0.25])
P_INIT = np.arange(12.0).reshape(3, 4) / 5 - 1


def extras(metric: str, dtype: Any = np.float64) -> dict[str, np.ndarray]:
    """What a metric needs beside the vectors."""
    given = {"center": CENTER.astype(dtype)} if metric.endswith("-centered") else {}
    return given | ({"initialization": P_INIT.astype(dtype)} if metric == "cosine-prompt" else {})


def literal(a: np.ndarray, b: np.ndarray, metric: str) -> float:
    """Each metric as its definition reads."""
    if metric == "cosine-flat":
        x, y = a.ravel(), b.ravel()
    else:
        x, y = a.mean(axis=0), b.mean(axis=0)
    if metric == "cosine-prompt":
        x, y = (P_INIT + a).mean(axis=0), (P_INIT + b).mean(axis=0)
    if metric.endswith("-centered"):
        x, y = x - CENTER, y - CENTER
    if metric.startswith("dot"):
        return float(x @ y)
    norms = np.linalg.norm(x) * np.linalg.norm(y)
    return float(x @ y / norms) if norms else 0.0


def test_a_value_worked_by_hand() -> None:
    a = np.array([[1.0, 2.0], [3.0, 4.0]])  # pools to (2, 3)
    b = np.array([[1.0, 0.0], [1.0, 2.0]])  # pools to (1, 1)
    assert similarity.similarity(a, b) == 5
    assert similarity.similarity(a, np.stack([a, b])).tolist() == [13, 5]
    assert similarity.similarity(np.stack([a, b]), np.stack([b, a, b])).tolist() == [[5, 13, 5], [2, 5, 2]]
    assert pool(np.stack([a, b])).tolist() == [[2, 3], [1, 1]]


@given(single, single)
def test_it_is_the_double_sum_of_equation_2(a: np.ndarray, b: np.ndarray) -> None:
    double_sum = sum(row @ other for row in a for other in b) / (len(a) * len(b))
    np.testing.assert_allclose(similarity.similarity(a, b), double_sum, atol=1e-9)


moderate = hnp.arrays(np.float64, (3, 4), elements=st.integers(-20, 20).map(lambda k: k / 2))


@pytest.mark.parametrize("metric", METRICS)
@given(a=moderate, b=moderate)
def test_each_metric_is_its_definition_and_symmetric(metric: Any, a: np.ndarray, b: np.ndarray) -> None:
    value = similarity.similarity(a, b, metric, **extras(metric))
    np.testing.assert_allclose(value, literal(a, b, metric), rtol=1e-9, atol=1e-9)
    assert similarity.similarity(b, a, metric, **extras(metric)) == value
    if metric.startswith("cosine"):
        assert -1 <= value <= 1
        np.testing.assert_allclose(similarity.similarity(a, a, metric, **extras(metric)), float(literal(a, a, metric)))


def test_cosines_worked_by_hand() -> None:
    a = np.array([[1.0, 2.0], [5.0, 6.0]])  # pools to (3, 4)
    b = np.array([[4.0, 6.0], [4.0, 0.0]])  # pools to (4, 3)
    assert similarity.similarity(a, b, "cosine") == pytest.approx(24 / 25)
    assert similarity.similarity(a, b, "cosine-flat") == pytest.approx(36 / np.sqrt(66 * 68))
    assert similarity.similarity(a, b, "cosine-centered", center=np.array([3.0, 3.0])) == 0  # (0, 1), (1, 0)
    assert similarity.similarity(a, b, "dot-centered", center=np.array([2.0, 3.0])) == 2  # (1, 1), (2, 0)
    start = np.array([[-3.0, 0.0], [-3.0, 0.0]])
    assert similarity.similarity(a, b, "cosine-prompt", initialization=start) == pytest.approx(12 / 4 / np.sqrt(10))


@pytest.mark.parametrize("metric", METRICS)
def test_a_cosine_with_zeros_is_zero(metric: Any) -> None:
    a = np.broadcast_to(CENTER, (3, 4)) if metric.endswith("-centered") else np.zeros((3, 4))
    a = -P_INIT if metric == "cosine-prompt" else a
    assert similarity.similarity(a, np.ones((2, 3, 4)), metric, **extras(metric)).tolist() == [0, 0]


@given(moderate, moderate, st.floats(0.1, 10))
def test_a_cosine_does_not_see_lengths(a: np.ndarray, b: np.ndarray, factor: float) -> None:
    for metric in ("cosine", "cosine-flat"):
        one, other = (similarity.similarity(x, b, metric) for x in (a, factor * a))  # type: ignore[arg-type]
        np.testing.assert_allclose(one, other, atol=1e-9)


@pytest.mark.parametrize("factor", [1e-40, 1e-25, 1e20, 1e37])
@pytest.mark.parametrize("metric", ["cosine", "cosine-flat"])
def test_a_cosine_of_float32_whose_squares_are_none(metric: Any, factor: float) -> None:
    a, b = np.random.default_rng(0).uniform(0.1, 1, size=(2, 3, 4))
    expected = similarity.similarity(a, b, metric)
    found = similarity.similarity((factor * a).astype(np.float32), b.astype(np.float32), metric)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@given(single, single, single, factors, factors)
def test_it_is_bilinear(a: np.ndarray, b: np.ndarray, c: np.ndarray, x: float, y: float) -> None:
    together = similarity.similarity(x * a + y * b, c)
    apart = x * similarity.similarity(a, c) + y * similarity.similarity(b, c)
    np.testing.assert_allclose(together, apart, atol=1e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_a_batch_compares_each_with_each(metric: Any) -> None:
    draw = np.random.default_rng(0)
    a, b = draw.normal(size=(5, 3, 4)).astype(np.float32), draw.normal(size=(2, 3, 4)).astype(np.float32)
    options = extras(metric, np.float32)
    matrix = similarity.similarity(a, b, metric, **options)
    assert (matrix.shape, matrix.dtype) == ((5, 2), np.float32)
    for i, j in product(range(5), range(2)):
        np.testing.assert_allclose(matrix[i, j], similarity.similarity(a[i], b[j], metric, **options), rtol=1e-4)
    np.testing.assert_array_equal(
        similarity.similarity(a, b[0], metric, **options), similarity.similarity(b[0], a, metric, **options)
    )
    np.testing.assert_allclose(similarity.similarity(a, b[0], metric, **options), matrix[:, 0], rtol=1e-4)


@pytest.mark.parametrize("metric", [metric for metric in METRICS if metric != "cosine-flat"])
def test_a_row_does_not_depend_on_the_rows_around_it(metric: Any) -> None:
    draw = np.random.default_rng(0)
    rows, one = draw.normal(size=(BLOCK + 301, 4)).astype(np.float32), draw.normal(size=4).astype(np.float32)
    options = extras(metric, np.float32)
    if metric == "cosine-prompt":
        options["initialization"] = pool(options["initialization"])
    order = draw.permutation(len(rows))
    values = pooled_similarity(rows, one, metric, **options)
    assert values.shape == (len(rows),)
    np.testing.assert_array_equal(pooled_similarity(rows[order], one, metric, **options), values[order])
    np.testing.assert_array_equal(pooled_similarity(rows[-3:], one, metric, **options), values[-3:])


@pytest.mark.parametrize("metric", METRICS)
def test_torch_agrees_with_numpy(metric: Any) -> None:
    torch = pytest.importorskip("torch")
    a, b = np.random.default_rng(0).normal(size=(2, 6, 3, 4))
    expected = similarity.similarity(a, b, metric, **extras(metric))
    there = {name: torch.from_numpy(value) for name, value in extras(metric).items()}
    found = similarity.similarity(torch.from_numpy(a), torch.from_numpy(b), metric, **there)
    assert isinstance(found, torch.Tensor)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    one = similarity.similarity(torch.from_numpy(a[0]), torch.from_numpy(b), metric, **there)
    np.testing.assert_allclose(one.numpy(), expected[0], rtol=1e-12)


def test_what_is_missing_or_superfluous_is_named() -> None:
    a = np.ones((1, 2))
    for options, message in (
        ({"metric": "euclid"}, "cosine-flat"),
        ({"metric": "dot-centered"}, "needs `center`"),
        ({"metric": "cosine-prompt"}, "needs `initialization`"),
        ({"metric": "dot", "center": np.ones(2)}, "takes no `center`"),
        ({"metric": "cosine-flat", "initialization": a}, "takes no `initialization`"),
    ):
        with pytest.raises(ValueError, match=message):
            similarity.similarity(a, a, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pooled"):
        pooled_similarity(np.ones(2), np.ones(2), "cosine-flat")
