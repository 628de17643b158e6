"""Text-to-text data: JSON Lines of `source` and `target`, few-shot samples of it, and the order of training batches."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from numpy.random import PCG64, Generator

from tpv_worker.errors import DataError


class Row(NamedTuple):
    """One example as text."""

    source: str  #: what the model reads
    target: str  #: what it should write


class Example(NamedTuple):
    """A row as token ids, made once by `Backbone.tokenize`."""

    source: list[int]  #: everything between the soft prompt and the target
    target: list[int]  #: the target's tokens and the end token
    text: str  #: the target as text
    task: int = 0  #: place of the row's task among those trained together


@dataclass(frozen=True, kw_only=True)
class Task:
    """The rows of one task that a run trains on and judges itself by."""

    train: Sequence[Row]
    validation: Sequence[Row] = ()
    label_words: tuple[str, ...] | None  #: all possible targets, if the task has a fixed list
    metric: Literal["accuracy"] = "accuracy"


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """The rows of a data set by split, with how they are judged.

    Raises DataError when the data set declares label words and a target is none of them.
    """

    splits: Mapping[str, Sequence[Row]]
    label_words: tuple[str, ...] | None  #: all possible targets, if the task has a fixed list
    metric: Literal["accuracy"] = "accuracy"
    fingerprint: str  #: of the registered data set

    def __post_init__(self) -> None:
        if self.label_words is not None:
            for split, rows in self.splits.items():
                for number, row in enumerate(rows, 1):
                    if row.target not in self.label_words:
                        words = ", ".join(self.label_words)
                        raise DataError(
                            f"split {split!r}, row {number}: target {row.target!r} is no label word ({words})"
                        )


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSON Lines file, one object with the texts `source` and `target` a line; other keys are ignored.

    Raises DataError with file and line when a line is something else, or when there is no row at all.
    """
    rows = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError as error:  # no JSON, or bytes that are no UTF-8
                raise DataError(f"{path.name}, line {number}: {error}") from error
            match value:
                case {"source": str(source), "target": str(target)}:
                    rows.append(Row(source, target))
                case _:
                    raise DataError(f"{path.name}, line {number}: no object with the texts `source` and `target`")
    if not rows:
        raise DataError(f"{path.name} has no rows")
    return rows


def few_shot(rows: Sequence[Row], shots: int, shot_seed: int) -> list[Row]:
    """`shots` of the rows in their old order, drawn without replacement so that each target keeps its share.

    `shots` counts all samples, not those of one class. Shares are rounded by largest remainder; which of equal
    remainders is rounded up, and which rows represent a target, is drawn from PCG64(shot_seed).
    Raises DataError when there are fewer rows than shots.
    """
    if shots > len(rows):
        raise DataError(f"{shots} shots are asked for, but there are only {len(rows)} rows")
    random = Generator(PCG64(shot_seed))
    by_target = defaultdict(list)
    for index, row in enumerate(rows):
        by_target[row.target].append(index)
    classes = list(by_target.values())
    classes = [classes[i] for i in random.permutation(len(classes))]
    counts = [shots * len(members) // len(rows) for members in classes]
    by_remainder = sorted(range(len(classes)), key=lambda i: -(shots * len(classes[i]) % len(rows)))
    for i in by_remainder[: shots - sum(counts)]:
        counts[i] += 1
    chosen = [random.choice(members, count, replace=False) for members, count in zip(classes, counts, strict=True)]
    return [rows[index] for index in sorted(index for indices in chosen for index in indices)]


def batches(
    lengths: Sequence[int], batch_size: int, seed: int, *, sizes: Sequence[int] | None = None, limit: int | None = None
) -> Iterator[list[int]]:
    """Row indices of training batches, epoch after epoch for ever; the same seed gives the same order.

    Each epoch is a new shuffle, cut into pools of up to 50 batches; inside a pool rows of about equal length come
    together, so that little is padding, and the pool's batches are then shuffled. A small data set has small pools
    (at least four of them, or no sorting at all), because sorting all of it would make the same batches in every
    epoch. An epoch's last rows that fill no batch are left out of it, unless there are fewer rows than one batch.

    Rows of several tasks stand one task after the other, `sizes` of them each, and are mixed in proportion to their
    numbers; a task of more than `limit` rows has that many in an epoch, drawn anew for each (examples-proportional
    mixing, section 3.5.2 of Raffel et al. 2020, https://arxiv.org/abs/1910.10683).
    """
    random = Generator(PCG64(seed))
    while True:
        rows = _epoch(sizes or [len(lengths)], limit, random)
        pool = batch_size * min(50, max(1, len(rows) // (4 * batch_size)))
        count = max(1, len(rows) // batch_size)
        order = [rows[i] for i in random.permutation(len(rows)).tolist()[: count * batch_size]]
        epoch = []
        for start in range(0, len(order), pool):
            members = order[start : start + pool]
            if pool > batch_size:
                members.sort(key=lambda row: -lengths[row])
            epoch += [members[i : i + batch_size] for i in range(0, len(members), batch_size)]
        for i in random.permutation(len(epoch)).tolist():
            yield epoch[i]


def _epoch(sizes: Sequence[int], limit: int | None, random: Generator) -> list[int]:
    """The rows of one epoch: all of them, but `limit` of a task that has more."""
    rows: list[int] = []
    first = 0
    for size in sizes:
        if limit is None or size <= limit:
            rows += range(first, first + size)
        else:
            rows += (first + random.choice(size, limit, replace=False)).tolist()
        first += size
    return rows
