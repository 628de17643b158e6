"""The pooled vectors of one initialization as a matrix beside the process, in files that only grow.

Postgres holds the truth; vectors over 2 KB lie out of line there, and reading a family through SQL takes ten times as
long as multiplying it. So each process keeps a copy, memory-mapped, and adds what is new. A copy that is torn, damaged
or of another database is dropped, and read again.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from tpv_service.search.sketch import Sketch, sketch_of

Rows = NDArray[np.intp]
Mask = NDArray[np.bool_]
Float32 = NDArray[np.float32]
Sorted = tuple[Rows, NDArray[np.uint64]]  #: rows in the order of their ids' second halves, and these halves

RECORD = np.dtype([("id", "V16"), ("vector", "V16"), ("txid", "<u8"), ("number", "<i4"), ("tasks", "<i8")])

_BLOCK = 1 << 26  #: bytes that are read at a time to check them
#: Bytes; more are synced at once. The kernel would write them all back half a minute later, and the fsync of a
#: registration would wait for it: 121 ms beside 300 MB, 20 ms like this.
_LARGE = 1 << 20
_SKETCHED = 5_000_000  #: numbers; fewer are multiplied as fast as a sketch is asked
_TAIL = 8  #: rows are sorted, and sketched, anew when one in so many has come since
_MANY = 64  #: vectors; the newest versions of more are found by sorting all rows once


@dataclass(frozen=True)
class Snapshot:
    """A family as it was at one moment; later additions and deletions do not change it."""

    matrix: Float32  #: (n, d), pooled vectors in the order they were added; memory-mapped
    records: NDArray[Any]  #: (n,) of RECORD
    alive: Mask  #: (n,), neither version nor vector is deleted
    newest: Mask  #: (n,), the newest living version of its vector
    tasks: NDArray[np.int32]  #: (n,), which list of tasks each has; a vector's tasks never change
    lists: Mapping[str, Sequence[int]]  #: by task, the lists that it is in
    places: Sorted  #: of the first rows, most of them all
    sketch: Sketch | None = None  #: of the first rows; none of a family that is multiplied as fast

    def __len__(self) -> int:
        return len(self.matrix)

    @cached_property
    def total(self) -> tuple[NDArray[np.float64], int]:
        """The sum (d,) of the newest versions' pooled vectors, and how many these are; what a centre is made of."""
        total = np.zeros(self.matrix.shape[1])
        for start in range(0, len(self), 4096):
            block = self.matrix[start : start + 4096][self.newest[start : start + 4096]]
            total += block.sum(axis=0, dtype=np.float64)
        return total, int(self.newest.sum())

    def rows_of(self, ids: NDArray[Any]) -> Rows:
        """The rows of the versions that are here; `ids` are (m,) of 16 bytes, and keep their order."""
        _, second = _halves(ids)
        rows = np.full(len(ids), -1)
        for order, halves in (self.places, self._tail):
            if len(order):
                found = order[np.minimum(np.searchsorted(halves, second), len(order) - 1)]
                rows = np.where(self.records["id"][found] == ids, found, rows)
        return rows[rows >= 0]

    def of_tasks(self, tasks: Iterable[str]) -> Rows:
        """The rows that have one of these tasks, ascending."""
        wanted = {number for task in tasks for number in self.lists.get(task, ())}
        return np.flatnonzero(np.isin(self.tasks, [*wanted]))

    @cached_property
    def _tail(self) -> Sorted:
        """The places of the rows that came after the sorted ones."""
        return _sorted(self.records, len(self.places[0]))

    def _rows_of_vector(self, vector: Any) -> Rows:
        first, second = _halves(self.records["vector"])
        one, other = _halves(np.array([vector], dtype="V16"))
        return np.flatnonzero((second == other[0]) & (first == one[0]))


class Family:
    """Writes and maps the files of one family. Not for two threads, nor for two processes, at a time."""

    def __init__(self, path: Path, width: int, source: str) -> None:
        """Opens the copy of the family at `path` (three files), or begins a new one.

        `source` tells the database apart from any other; a copy of another one is dropped.
        """
        self.width, self.source = width, source
        self.settled = False  #: nothing has been added since the last `settle`; if that fails, it must be opened again
        self.horizon = 0  #: every transaction with a smaller number had ended when the copy was last brought up to date
        self.reached = False  #: the log has the horizon of a look that came to its end after the last rows were added
        self._head = {"format": 2, "source": source, "width": width}
        self._log, self._matrix, self._records = (path.with_suffix(f".{name}") for name in ("log", "f32", "rows"))
        count = self._recover()
        for file, size in ((self._matrix, 4 * width), (self._records, RECORD.itemsize)):
            if count == 0:  # snapshots of a former copy may still map the old files
                file.unlink(missing_ok=True)
            with file.open("ab") as opened:
                opened.truncate(count * size)
        alive = np.ones(count, dtype=bool)
        self._places = _sorted(np.zeros(0, RECORD))
        self._numbers: dict[int, int] = {}  #: of a list of tasks, by its hash
        self._lists: dict[str, list[int]] = {}
        self.untold: dict[int, UUID] = {}  #: hashes of lists that `tell` has not told of yet, with a vector of each
        self.snapshot = self._map(count, alive, np.zeros(count, dtype=bool), np.zeros(0, np.int32))
        self._touched: list[NDArray[Any]] = [self.snapshot.records["vector"]]
        self._recent = np.arange(count)  #: rows that may be of a transaction since the horizon, which only grows
        self.settle()

    def append(self, records: NDArray[Any], pooled: Float32, alive: Mask, horizon: int) -> None:
        """Adds rows (n, d) with their records; `settle` makes them part of the next snapshot in full.

        After an error the family must be opened again, for its files may have grown without it.
        """
        self.settled = self.reached = False
        now = self.snapshot
        contents = np.ascontiguousarray(pooled, dtype="<f4").tobytes(), records.tobytes()
        for file, content in zip((self._matrix, self._records), contents, strict=True):
            with file.open("ab") as opened:
                opened.write(content)
                if len(content) > _LARGE:
                    os.fsync(opened.fileno())
        count = len(now) + len(records)
        self._write_entry(count, [zlib.crc32(content) for content in contents], horizon)
        newest = np.concatenate([now.newest, np.zeros_like(alive)])
        self.snapshot = replace(
            self._map(count, np.concatenate([now.alive, alive]), newest, now.tasks), sketch=now.sketch
        )
        self._touched.append(records["vector"])
        self._recent = np.concatenate([self._recent, np.arange(len(now), count)])

    def settle(self) -> None:
        """Finds the newest versions among what was added since the last time."""
        touched = np.unique(np.concatenate(self._touched))
        self._touched = [touched[:0]]
        if len(touched):
            self.snapshot = _with_newest(self.snapshot, touched)
        now = self.snapshot
        if now.matrix.size >= _SKETCHED and _TAIL * (len(now) - len(now.sketch or ())) > len(now):
            self.snapshot = replace(now, sketch=sketch_of(now.matrix, now.sketch))
        self.settled = True

    def tell(self, hashed: int, tasks: Sequence[str]) -> None:
        """Says which list of tasks has this hash."""
        if self.untold.pop(hashed, None):
            for task in tasks:
                self._lists.setdefault(task, []).append(self._numbers[hashed])

    def reach(self, horizon: int) -> None:
        """Says that all is here of the transactions below this number."""
        self._write_entry(len(self.snapshot), [0, 0], horizon)
        self.reached = True

    def forget(self) -> None:
        """Makes whoever opens the copy next begin a new one."""
        self._log.unlink(missing_ok=True)

    def _write_entry(self, rows: int, crc: list[int], horizon: int) -> None:
        with self._log.open("a") as log:
            log.write(json.dumps({"rows": rows, "crc": crc, "horizon": horizon}) + "\n")
        self.horizon = horizon

    def set_alive(self, ids: Sequence[UUID], alive: Sequence[bool]) -> None:
        """Says of versions, some of which may not be here, whether they live."""
        now = self.snapshot
        states = dict(zip(ids, alive, strict=True))
        changed = now.alive.copy()
        for row in now.rows_of(as_bytes(states)).tolist():
            changed[row] = states[UUID(bytes=now.records["id"][row].tobytes())]
        rows = np.flatnonzero(changed != now.alive)
        if len(rows):
            touched = np.unique(now.records["vector"][rows])
            self.snapshot = _with_newest(replace(now, alive=changed), touched)

    @property
    def recent(self) -> int:
        """How many versions `since_horizon` looks through."""
        return len(self._recent)

    def since_horizon(self) -> list[UUID]:
        """The versions that a look at everything since the horizon would find again."""
        records = self.snapshot.records
        self._recent = self._recent[records["txid"][self._recent] >= self.horizon]
        return [UUID(bytes=version.tobytes()) for version in records["id"][self._recent]]

    def _map(self, count: int, alive: Mask, newest: Mask, tasks: NDArray[np.int32]) -> Snapshot:
        """The first `count` rows as a snapshot; `tasks` of the first of them are known."""
        if count == 0:
            nothing = np.zeros((0, self.width), np.float32), np.zeros(0, RECORD)
            return Snapshot(*nothing, alive, newest, tasks, self._lists, self._places)
        matrix = np.memmap(self._matrix, "<f4", mode="r", shape=(count, self.width)).view(np.ndarray)
        records = np.memmap(self._records, RECORD, mode="r", shape=(count,)).view(np.ndarray)
        if _TAIL * (count - len(self._places[0])) > count:
            self._places = _sorted(records)
        tasks = np.concatenate([tasks, self._tasks_of(records[len(tasks) :])])
        return Snapshot(matrix, records, alive, newest, tasks, self._lists, self._places)

    def _tasks_of(self, records: NDArray[Any]) -> NDArray[np.int32]:
        """The number of each row's list of tasks; one that is new here gets the next."""
        hashes, first, places = np.unique(records["tasks"], return_index=True, return_inverse=True)
        for hashed, row in zip(hashes.tolist(), first.tolist(), strict=True):
            if hashed not in self._numbers:
                self._numbers[hashed] = len(self._numbers)
                self.untold[hashed] = UUID(bytes=records["vector"][row].tobytes())
        return np.array([self._numbers[hashed] for hashed in hashes.tolist()], np.int32)[places]

    def _recover(self) -> int:
        """How many rows of the files are whole; 0, with a new log, when they cannot be trusted."""
        try:
            head, *entries = [json.loads(line) for line in self._log.read_text().splitlines()]
            if head != self._head:
                raise ValueError
            count = 0
            with self._matrix.open("rb") as matrix, self._records.open("rb") as records:
                for entry in entries:
                    added = entry["rows"] - count
                    sizes = (added * 4 * self.width, added * RECORD.itemsize)
                    if [_crc(f, size) for f, size in zip((matrix, records), sizes, strict=True)] != entry["crc"]:
                        raise ValueError
                    count, self.horizon = entry["rows"], entry["horizon"]
            return count
        except (OSError, ValueError, KeyError, TypeError):
            # Also after a torn last write: to read the family again costs seconds, to be wrong costs trust.
            self.horizon = 0
            self._log.write_text(json.dumps(self._head) + "\n")
            return 0


def _crc(file: Any, size: int) -> int:
    crc = 0
    while size > 0:
        content = file.read(min(size, _BLOCK))
        if not content:
            raise ValueError
        crc, size = zlib.crc32(content, crc), size - len(content)
    return crc


def _halves(ids: NDArray[Any]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    halves = np.ascontiguousarray(ids).view(">u8").reshape(-1, 2)
    return halves[:, 0], halves[:, 1].astype(np.uint64)


def _sorted(records: NDArray[Any], start: int = 0) -> Sorted:
    second = _halves(records["id"][start:])[1]  # 62 of its bits are random: no two are equal
    order = np.argsort(second, kind="stable")
    return order + start, second[order]


def by_age(ids: NDArray[Any], rows: Rows) -> Rows:
    """The rows, the oldest first: ids, of 16 bytes, begin with the time at which they were made (UUID 7)."""
    first, second = _halves(ids[rows])
    ordered: Rows = rows[np.lexsort((second, first))]
    return ordered


def as_bytes(ids: Iterable[UUID]) -> NDArray[Any]:
    """Ids as (m,) of 16 bytes."""
    return np.array([version.bytes for version in ids], dtype="V16")


def _with_newest(snapshot: Snapshot, touched: NDArray[Any]) -> Snapshot:
    """The snapshot with `newest` made true again for the touched vectors."""
    numbers, alive = snapshot.records["number"], snapshot.alive
    if len(touched) <= _MANY:
        newest = snapshot.newest.copy()
        for vector in touched:
            rows = snapshot._rows_of_vector(vector)
            newest[rows] = False
            if (living := rows[alive[rows]]).size:
                newest[living[np.argmax(numbers[living])]] = True
    else:
        newest = np.zeros(len(snapshot), dtype=bool)
        rows = np.flatnonzero(alive)
        first, second = _halves(snapshot.records["vector"][rows])
        order = np.lexsort((numbers[rows], second, first))
        last = np.ones(len(rows), dtype=bool)  # of its vector, in this order
        last[:-1] = (np.diff(first[order]) != 0) | (np.diff(second[order]) != 0)
        newest[rows[order[last]]] = True
    return replace(snapshot, newest=newest)
