"""The copy of a family that a process keeps on disk."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID, uuid4

import numpy as np
import pytest

from tpv_service.search.family import RECORD, Family, as_bytes

WIDTH = 5
SOURCE = "a database"


def rows(count: int, *, vectors: list[UUID] | None = None, number: int = 1, txid: int = 10) -> np.ndarray:
    records = np.zeros(count, RECORD)
    for i in range(count):
        records["id"][i] = uuid4().bytes
        records["vector"][i] = (vectors[i] if vectors else uuid4()).bytes
    records["number"], records["txid"] = number, txid
    return records


def add(family: Family, records: np.ndarray, horizon: int = 20) -> np.ndarray:
    pooled = np.random.default_rng(len(family.snapshot)).normal(size=(len(records), WIDTH)).astype(np.float32)
    family.append(records, pooled, np.ones(len(records), dtype=bool), horizon)
    family.settle()
    return pooled


def ids(records: np.ndarray) -> list[UUID]:
    return [UUID(bytes=bytes(version)) for version in records["id"]]


def ids_of_vectors(records: np.ndarray) -> list[UUID]:
    return [UUID(bytes=bytes(vector)) for vector in records["vector"]]


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return Family(tmp_path / "family", WIDTH, SOURCE)


def reopened(tmp_path: Path, source: str = SOURCE, width: int = WIDTH) -> Family:
    return Family(tmp_path / "family", width, source)


def test_a_restart_goes_on_from_where_the_last_look_came_to_its_end(family: Family, tmp_path: Path) -> None:
    records = rows(3)
    add(family, records, horizon=20)
    assert not family.reached
    assert reopened(tmp_path).horizon == 20

    family.reach(30)
    assert family.reached
    again = reopened(tmp_path)
    assert again.horizon == 30
    assert ids(again.snapshot.records) == ids(records)


def test_what_was_added_is_there_after_a_restart(family: Family, tmp_path: Path) -> None:
    first, second = rows(3), rows(2)
    pooled = np.concatenate([add(family, first), add(family, second, horizon=30)])
    again = reopened(tmp_path)

    np.testing.assert_array_equal(again.snapshot.matrix, pooled)
    assert ids(again.snapshot.records) == ids(first) + ids(second)
    assert again.horizon == 30
    assert again.snapshot.newest.all()


def test_rows_are_found_by_the_ids_of_their_versions(family: Family) -> None:
    records = rows(100)
    add(family, records)
    wanted = [ids(records)[i] for i in (70, 3, 99)]

    assert family.snapshot.rows_of(as_bytes([wanted[0], uuid4(), *wanted[1:]])).tolist() == [70, 3, 99]
    assert family.snapshot.rows_of(as_bytes([])).tolist() == []


def test_rows_are_found_whenever_they_came(family: Family) -> None:
    added = [rows(n) for n in (40, 1, 1, 30, 2)]
    for records in added:
        add(family, records)
        assert family.snapshot.rows_of(as_bytes(ids(family.snapshot.records))).tolist() == [
            *range(len(family.snapshot))
        ]


def test_rows_of_an_empty_family(family: Family) -> None:
    assert family.snapshot.rows_of(as_bytes([uuid4()])).tolist() == []


@pytest.mark.parametrize("count", [3, 200], ids=["a few at a time", "many at a time"])
def test_the_newest_living_version_of_each_vector_is_known(family: Family, count: int) -> None:
    vectors = [uuid4() for _ in range(count)]
    versions = [rows(count, vectors=vectors, number=number) for number in (2, 1, 3)]
    for records in versions:
        add(family, records)

    assert np.flatnonzero(family.snapshot.newest).tolist() == list(range(2 * count, 3 * count))
    family.set_alive(ids(versions[2]), [False] * count)
    assert np.flatnonzero(family.snapshot.newest).tolist() == list(range(count))
    family.set_alive(ids(versions[2])[:1], [True])
    assert np.flatnonzero(family.snapshot.newest).tolist() == [*range(1, count), 2 * count]


def test_rows_are_found_by_any_of_their_tasks_after_a_restart_too(family: Family, tmp_path: Path) -> None:
    lists = {7: ["mnli", "snli"], -3: ["snli"], 0: []}
    first, second = rows(4), rows(3)
    first["tasks"], second["tasks"] = [7, -3, 7, 0], [-3, -3, 7]

    def told(family: Family) -> list[list[int]]:
        for hashed in list(family.untold):
            family.tell(hashed, lists[hashed])
        return [family.snapshot.of_tasks(asked).tolist() for asked in (["mnli"], ["snli", "mnli"], ["boolq"], [])]

    add(family, first)
    assert family.untold == {7: ids_of_vectors(first)[0], -3: ids_of_vectors(first)[1], 0: ids_of_vectors(first)[3]}
    assert told(family) == [[0, 2], [0, 1, 2], [], []]
    add(family, second)
    assert told(family) == told(reopened(tmp_path)) == [[0, 2, 6], [0, 1, 2, 4, 5, 6], [], []]


def test_a_snapshot_stays_as_it_was(family: Family) -> None:
    records = rows(2)
    add(family, records)
    before = family.snapshot
    add(family, rows(1))
    family.set_alive(ids(records), [False, False])

    assert (len(before), before.newest.tolist()) == (2, [True, True])


def test_what_a_look_since_the_horizon_finds_again_is_known(family: Family) -> None:
    old, new = rows(2, txid=5), rows(2, txid=25)
    add(family, old)
    add(family, new)

    assert family.since_horizon() == ids(new)


@pytest.mark.parametrize(
    "damage",
    [
        lambda place: (place / "family.f32").write_bytes(b"x" * 40),
        lambda place: (place / "family.rows").unlink(),
        lambda place: (place / "family.log").write_text("no JSON"),
        lambda place: (place / "family.log").write_text("{}\n"),
        lambda place: _flip(place / "family.f32"),
        lambda place: _flip(place / "family.rows"),
        lambda place: (place / "family.f32").write_bytes((place / "family.f32").read_bytes()[:-4]),
    ],
    ids=["other", "missing", "no log", "other log", "a bit of a vector", "a bit of a record", "torn"],
)
def test_a_damaged_copy_is_dropped_and_begun_again(family: Family, tmp_path: Path, damage) -> None:  # type: ignore[no-untyped-def]
    add(family, rows(3))
    damage(tmp_path)
    again = reopened(tmp_path)

    assert (len(again.snapshot), again.horizon) == (0, 0)
    pooled = add(again, rows(2))
    np.testing.assert_array_equal(reopened(tmp_path).snapshot.matrix, pooled)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_what_an_interrupted_addition_has_left_is_cut_off(family: Family, tmp_path: Path) -> None:
    pooled = add(family, rows(3))
    for name in ("f32", "rows"):
        with (tmp_path / f"family.{name}").open("ab") as file:
            file.write(b"half a row")
    again = reopened(tmp_path)

    np.testing.assert_array_equal(again.snapshot.matrix, pooled)
    added = add(again, rows(1))
    np.testing.assert_array_equal(reopened(tmp_path).snapshot.matrix, np.concatenate([pooled, added]))


def test_a_copy_of_another_database_or_width_is_dropped(family: Family, tmp_path: Path) -> None:
    add(family, rows(3))
    assert len(reopened(tmp_path, source="another").snapshot) == 0
    add(reopened(tmp_path, source="another"), rows(3))
    assert len(reopened(tmp_path, source="another", width=WIDTH + 1).snapshot) == 0


def test_a_forgotten_copy_is_begun_anew_and_old_snapshots_live_on(family: Family, tmp_path: Path) -> None:
    pooled = add(family, rows(3))
    before = family.snapshot
    family.forget()

    assert len(reopened(tmp_path).snapshot) == 0
    np.testing.assert_array_equal(before.matrix, pooled)


def test_the_total_is_of_the_newest_versions(family: Family) -> None:
    vector = uuid4()
    add(family, rows(1, vectors=[vector], number=1))
    pooled = np.concatenate([add(family, rows(1, vectors=[vector], number=2)), add(family, rows(4))])
    total, count = family.snapshot.total

    assert count == 5
    np.testing.assert_allclose(total, pooled.sum(axis=0), rtol=1e-6)
