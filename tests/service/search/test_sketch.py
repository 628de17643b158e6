"""The best of a large family, found without comparing all: exactly those that comparing all gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tpv_service.search import family
from tpv_service.search.family import RECORD, Family
from tpv_service.search.scores import best
from tpv_service.search.sketch import sketch_of

COUNT, WIDTH = 24_000, 24


def alike(seed: int, count: int = COUNT) -> np.ndarray:
    """Vectors around a few centres in 4 of 24 dimensions, some of them twice, with norms of all sizes; and noise."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(20, 4)) @ np.linalg.qr(random.normal(size=(WIDTH, 4)))[0].T
    vectors = centres[random.integers(20, size=count)] * random.lognormal(size=(count, 1))
    vectors += 0.05 * random.normal(size=vectors.shape)
    vectors[count // 2 :: 7] = vectors[: len(vectors[count // 2 :: 7])]
    return vectors.astype(np.float32)


def best_of_all(matrix: np.ndarray, query: np.ndarray, where: np.ndarray, k: int) -> list[int]:
    return sorted(best(matrix @ query, where, np.zeros(len(matrix), "V16"), k).tolist())


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("sketched", [COUNT, COUNT - 900])
@pytest.mark.parametrize("seed", range(2))
def test_nothing_that_is_among_the_best_is_ruled_out(seed, sketched, k):
    matrix, random = alike(seed), np.random.default_rng(seed)
    sketch, ruled_out = sketch_of(matrix[:sketched]), 0
    for _ in range(20):
        where = random.random(COUNT) < random.choice([0.5, 1.0])
        query = random.choice([matrix[random.integers(COUNT)], random.normal(size=WIDTH), -matrix[0]])
        rows = sketch.promising(matrix, query.astype(np.float32), where, k)
        if rows is not None:
            ruled_out += 1
            assert where[rows].all()
            products = matrix[rows] @ query.astype(np.float32)
            found = rows[best(products, np.ones(len(rows), bool), np.zeros(len(rows), "V16"), k)]
            expected = best_of_all(matrix, query.astype(np.float32), where, k)
            np.testing.assert_allclose(
                np.sort(matrix[found] @ query)[-k:], np.sort(matrix[expected] @ query)[-k:], rtol=1e-5, atol=1e-5
            )
            assert set(expected) <= set(rows.tolist())
    assert ruled_out > 10


@pytest.mark.parametrize("scale", [1e-30, 1e-23, 1e25])
@pytest.mark.parametrize("scaled", ["query", "vectors"])
def test_very_small_and_very_large_numbers_change_nothing(scaled, scale):
    matrix, everywhere = alike(0), np.ones(COUNT, bool)
    expected = sketch_of(matrix).promising(matrix, matrix[5], everywhere, 1)
    query = matrix[5] * np.float32(scale if scaled == "query" else 1)
    others = matrix * np.float32(scale if scaled == "vectors" else 1)
    rows = sketch_of(others).promising(others, query, everywhere, 1)

    assert expected is not None
    assert rows is not None
    assert set(best_of_all(matrix, matrix[5], everywhere, 1)) <= set(rows.tolist())


def test_a_query_of_zeros_rules_nothing_out():
    matrix = alike(0)
    assert sketch_of(matrix).promising(matrix, np.zeros(WIDTH, np.float32), np.ones(COUNT, bool), 1) is None


def test_most_are_ruled_out():
    matrix = alike(0)
    rows = sketch_of(matrix).promising(matrix, matrix[5], np.ones(COUNT, bool), 1)

    assert rows is not None
    assert len(rows) < COUNT / 20


def test_the_best_may_be_excluded():
    matrix, where = alike(0), np.ones(COUNT, bool)
    where[np.argsort(-(matrix @ matrix[5]))[:1000]] = False
    rows = sketch_of(matrix).promising(matrix, matrix[5], where, 1)

    assert rows is not None
    assert where[rows].all()
    assert set(best_of_all(matrix, matrix[5], where, 1)) <= set(rows.tolist())


def test_where_vectors_have_nothing_in_common_all_are_compared():
    matrix = np.random.default_rng(0).normal(size=(COUNT, 200)).astype(np.float32)

    assert sketch_of(matrix).promising(matrix, matrix[5], np.ones(COUNT, bool), 1) is None


@pytest.mark.parametrize("value", [0.0, 1e30])
def test_zeros_and_overflows_rule_nothing_out_that_is_good(value):
    matrix = alike(1)
    matrix[17] = value
    with np.errstate(over="ignore", invalid="ignore"):
        rows = sketch_of(matrix).promising(matrix, matrix[5], np.ones(COUNT, bool), 1)

    assert rows is not None
    assert set(best_of_all(matrix, matrix[5], np.ones(COUNT, bool), 1)) <= set(rows.tolist())


def test_a_sketch_grows_with_its_family():
    matrix = alike(2)
    small = sketch_of(matrix[: COUNT // 3])
    grown = sketch_of(matrix, small)

    assert (len(grown), grown.found_in) == (COUNT, COUNT // 3)
    np.testing.assert_array_equal(grown.basis, small.basis)
    np.testing.assert_allclose(grown.low[:-1].T, (matrix @ small.basis)[grown.rows], atol=1e-4)
    assert (np.diff(grown.norms) <= 0).all()
    assert sketch_of(np.concatenate([matrix, matrix]), small).found_in == 2 * COUNT


def test_a_large_family_has_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(family, "_SKETCHED", COUNT * WIDTH)
    copy = Family(tmp_path / "family", WIDTH, "a database")
    matrix = alike(3)
    for part in (matrix[: COUNT - 1], matrix[COUNT - 1 :], matrix[:10]):
        records = np.zeros(len(part), RECORD)
        ids = np.random.default_rng(len(copy.snapshot)).bytes(16 * len(part))
        records["id"] = records["vector"] = np.frombuffer(ids, "V16")
        records["number"] = 1
        copy.append(records, part, np.ones(len(part), bool), 5)
        copy.settle()

    assert len(copy.snapshot) == COUNT + 10
    assert len(copy.snapshot.sketch) == COUNT
    assert len(Family(tmp_path / "family", WIDTH, "a database").snapshot.sketch) == COUNT + 10
