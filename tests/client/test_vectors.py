from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tpv import TaskPromptVector, files
from tpv.errors import IncompatibleVectors, InvalidTensor
from tpv.vectors import as_prompt

START = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], np.float32)
HERE, ELSEWHERE = files.fingerprint(START), "sha256:" + "0" * 64
values = hnp.arrays(np.float32, (2, 3), elements=st.floats(-1000, 1000, width=32))
vectors = values.map(lambda tensor: TaskPromptVector(tensor, HERE))
factors = st.floats(-8, 8, width=16)


def close(a: TaskPromptVector, b: TaskPromptVector) -> None:
    assert a.initialization == b.initialization
    np.testing.assert_allclose(a.tensor, b.tensor, rtol=1e-5, atol=1e-2)


def test_a_value_worked_by_hand() -> None:
    tuned = np.array([[2.0, 2.0, 2.0], [4.0, 6.0, 8.0]])
    T = TaskPromptVector.from_prompt(tuned, START)
    assert T.tensor.tolist() == [[1, 0, -1], [0, 1, 2]]
    assert T.pooled.tolist() == [0.5, 0.5, 0.5]
    assert T.norm == pytest.approx(7**0.5)
    assert T.apply(START).tolist() == tuned.tolist()
    assert T.apply(START, scale=0.5).tolist() == [[1.5, 2, 2.5], [4, 5.5, 7]]
    assert (T + T - 0.5 * T).tensor.tolist() == [[1.5, 0, -1.5], [0, 1.5, 3]]


@given(vectors, vectors)
def test_subtraction_undoes_addition(a: TaskPromptVector, b: TaskPromptVector) -> None:
    close((a + b) - b, a)


@given(vectors, vectors, vectors)
def test_the_order_of_addition_does_not_matter(a: TaskPromptVector, b: TaskPromptVector, c: TaskPromptVector) -> None:
    assert a + b == b + a
    close((a + b) + c, a + (b + c))
    assert sum([a, b, c]) == a + b + c


@given(vectors, vectors, factors)
def test_scaling_distributes(a: TaskPromptVector, b: TaskPromptVector, factor: float) -> None:
    close(factor * (a + b), a * factor + b * factor)
    assert -a == -1 * a
    close(a - b, a + -b)


@given(vectors, vectors)
def test_applying_a_sum_is_applying_one_after_the_other(a: TaskPromptVector, b: TaskPromptVector) -> None:
    both = (a + b).apply(START)
    one_by_one = b.apply(a.apply(START), allow_mixed_initializations=True)
    np.testing.assert_allclose(both, one_by_one, rtol=1e-5, atol=1e-2)


@given(values)
def test_applying_gives_back_the_tuned_prompt(tuned: np.ndarray) -> None:
    np.testing.assert_allclose(TaskPromptVector.from_prompt(tuned, START).apply(START), tuned, rtol=1e-5, atol=1e-3)


def test_vectors_of_another_initialization_are_refused() -> None:
    a, b = TaskPromptVector(START, HERE), TaskPromptVector(START, ELSEWHERE)
    for operation in (lambda: a + b, lambda: a - b, lambda: sum([a, b]), lambda: b.apply(START)):
        with pytest.raises(IncompatibleVectors) as error:
            operation()
        assert set(error.value.extra["differences"]["initialization"]) == {HERE, ELSEWHERE}
    with pytest.raises(
        IncompatibleVectors, match="with allow_mixed_initializations it is applied to another all the same"
    ):
        b.apply(START)
    assert a != b
    assert b.apply(START, allow_mixed_initializations=True).tolist() == (2 * START).tolist()


def test_shapes_that_do_not_fit_are_refused_even_when_mixing_is_allowed() -> None:
    T = TaskPromptVector(np.ones((1, 3), np.float32), HERE)
    with pytest.raises(IncompatibleVectors, match=r"\[1, 3\].*\[2, 3\]"):
        T.apply(START, allow_mixed_initializations=True)
    with pytest.raises(IncompatibleVectors):
        TaskPromptVector.from_prompt(np.ones((1, 3)), START)
    with pytest.raises(IncompatibleVectors, match=r"one vector is \[1, 3\], the other \[2, 3\]"):
        T + TaskPromptVector(START, HERE)


@pytest.mark.parametrize("other", [1, "x", None, np.ones((2, 3), np.float32)])
def test_what_is_no_vector_is_neither_added_nor_subtracted(other: Any) -> None:
    T = TaskPromptVector(START, HERE)
    for operation in (lambda: T + other, lambda: T - other, lambda: other - T):
        with pytest.raises(TypeError, match=r"unsupported operand|does not support"):
            operation()
    if not isinstance(other, int):
        with pytest.raises(TypeError):
            other * T


def test_a_vector_never_changes() -> None:
    mine = np.ones((2, 3), np.float32)
    T = TaskPromptVector(mine, HERE)
    mine[:] = 9
    assert T.tensor.tolist() == [[1, 1, 1], [1, 1, 1]]
    with pytest.raises(ValueError, match="read-only"):
        T.tensor[0, 0] = 2
    with pytest.raises(AttributeError):
        T.tensor = mine  # type: ignore[misc]


def test_equal_vectors_are_equal_and_hash_alike() -> None:
    a, b = TaskPromptVector(START, HERE), TaskPromptVector(START.astype(np.float64), HERE)
    assert a == b
    assert len({a, b}) == 1
    assert a != 2 * a
    zero = TaskPromptVector(np.zeros((2, 3), np.float32), HERE)
    assert zero == -zero
    assert hash(zero) == hash(-zero)
    assert a != START.tolist()
    assert a.fingerprint == files.fingerprint(START)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.ones((2, 3), np.int64), "int64"),
        (np.ones(3), "shape"),
        (np.ones((0, 3)), "shape"),
        (np.array([[np.nan]]), "NaN"),
        (np.array([[1e300]]), "infinite"),
        (np.ones((1, 1), complex), "complex"),
    ],
)
def test_what_is_no_prompt_is_refused(values: Any, reason: str) -> None:
    with pytest.raises(InvalidTensor, match=reason):
        as_prompt(values)


def test_save_and_load_keep_the_initialization(tmp_path: Path) -> None:
    path = tmp_path / "T.safetensors"
    T = TaskPromptVector(START, ELSEWHERE)
    T.save(path)
    assert TaskPromptVector.load(path) == T
    path.write_bytes(files.dump({"vector": START}))
    with pytest.raises(InvalidTensor, match="no saved vector"):
        TaskPromptVector.load(path)


def test_a_vector_without_a_fingerprint_is_refused() -> None:
    with pytest.raises(InvalidTensor, match="fingerprint"):
        TaskPromptVector(START, "family")
