from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tpv import similarity
from tpv.similarity import pool

single = hnp.arrays(np.float64, (3, 4), elements=st.floats(-10, 10))
factors = st.floats(-10, 10)


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


@given(single, single)
def test_it_is_symmetric(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_allclose(similarity.similarity(a, b), similarity.similarity(b, a), atol=1e-12)


@given(single, single, single, factors, factors)
def test_it_is_bilinear(a: np.ndarray, b: np.ndarray, c: np.ndarray, x: float, y: float) -> None:
    together = similarity.similarity(x * a + y * b, c)
    apart = x * similarity.similarity(a, c) + y * similarity.similarity(b, c)
    np.testing.assert_allclose(together, apart, atol=1e-6)


@given(hnp.arrays(np.float32, (5, 3, 4), elements=st.floats(-10, 10, width=32)))
def test_a_batch_compares_each_with_each(batch: np.ndarray) -> None:
    matrix = similarity.similarity(batch, batch)
    assert matrix.shape == (5, 5)
    assert matrix.dtype == np.float32
    for i in range(5):
        for j in range(5):
            np.testing.assert_allclose(matrix[i, j], similarity.similarity(batch[i], batch[j]), rtol=1e-4, atol=1e-3)


def test_torch_agrees_with_numpy() -> None:
    torch = pytest.importorskip("torch")
    a, b = np.random.default_rng(0).normal(size=(2, 6, 3, 4))
    expected = similarity.similarity(a, b)
    found = similarity.similarity(torch.from_numpy(a), torch.from_numpy(b))
    assert isinstance(found, torch.Tensor)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(similarity.similarity(torch.from_numpy(a[0]), torch.from_numpy(b)).numpy(), expected[0])


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(ValueError, match="cosine"):
        similarity.similarity(np.ones((1, 1)), np.ones((1, 1)), metric="cosine")  # type: ignore[arg-type]
