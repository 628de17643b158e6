from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from tpv_worker.data import Dataset, Row, batches, few_shot, read_rows
from tpv_worker.errors import DataError


def test_rows_are_read_from_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(
        '{"source": "héllo", "target": "yes", "label": 1}\n\n{"target": "no", "source": ""}\n', encoding="utf-8"
    )
    assert read_rows(path) == [Row("héllo", "yes"), Row("", "no")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "train.jsonl has no rows"),
        (b'{"source": "a", "target": "b"}\n{"source"', "train.jsonl, line 2: "),
        (b'{"source": "a", "target": 1}', "line 1: no object with the texts"),
        (b'{"source": "a"}', "line 1: no object with the texts"),
        (b"[]", "line 1: no object with the texts"),
        (b'{"source": "\xff", "target": "b"}', "line 1: "),
    ],
)
def test_what_is_no_row_is_named_with_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_rows(path)


def test_a_target_has_to_be_a_label_word() -> None:
    rows = [Row("a", "yes"), Row("b", "maybe")]
    Dataset(splits={"train": rows}, label_words=None, fingerprint="sha256:0")
    with pytest.raises(DataError, match=r"split 'train', row 2: target 'maybe' is no label word \(yes, no\)"):
        Dataset(splits={"train": rows}, label_words=("yes", "no"), fingerprint="sha256:0")


def test_few_shot_keeps_the_shares_of_the_targets() -> None:
    rows = [Row(str(i), "a" if i % 4 else "b") for i in range(100)]
    sample = few_shot(rows, 16, 5)
    assert Counter(row.target for row in sample) == {"a": 12, "b": 4}
    assert sample == few_shot(rows, 16, 5)
    assert sample != few_shot(rows, 16, 6)
    assert sample == sorted(sample, key=rows.index)
    assert len(set(sample)) == 16


def test_few_shot_gives_exactly_the_rows_asked_for() -> None:
    rows = [Row(str(i), str(i % 7)) for i in range(50)]
    for shots in (1, 5, 13, 50):
        assert len(few_shot(rows, shots, 0)) == shots
    assert few_shot(rows, 50, 0) == rows
    with pytest.raises(DataError, match="51 shots are asked for, but there are only 50 rows"):
        few_shot(rows, 51, 0)


def test_few_shot_of_free_text_draws_among_all_rows() -> None:
    rows = [Row("", str(i)) for i in range(30)]
    assert {row for seed in range(30) for row in few_shot(rows, 4, seed)} == set(rows)


def test_batches_go_on_for_ever_in_an_order_fixed_by_the_seed() -> None:
    lengths = [1] * 10
    order = list(islice(batches(lengths, 3, 7), 60))
    assert order == list(islice(batches(lengths, 3, 7), 60))
    assert order != list(islice(batches(lengths, 3, 8), 60))
    assert {len(batch) for batch in order} == {3}
    for epoch in range(20):
        seen = [i for batch in order[3 * epoch : 3 * epoch + 3] for i in batch]
        assert len(set(seen)) == 9
    assert {i for batch in order for i in batch} == set(range(10))


def test_fewer_rows_than_a_batch_are_one_batch() -> None:
    assert [sorted(batch) for batch in islice(batches([5, 6], 8, 0), 3)] == [[0, 1]] * 3


def test_a_batch_holds_rows_of_about_equal_length() -> None:
    lengths = [1 + (37 * i) % 100 for i in range(4000)]
    spread = [
        max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in islice(batches(lengths, 8, 0), 500)
    ]
    assert sum(spread) / len(spread) < 10


def test_tasks_are_mixed_in_proportion_to_their_rows() -> None:
    order = islice(batches([1] * 40, 4, 0, sizes=[30, 10]), 100)
    assert Counter(i >= 30 for batch in order for i in batch) == {False: 300, True: 100}


def test_a_task_over_the_limit_counts_as_much_as_the_limit() -> None:
    epochs = [list(islice(batches([1] * 40, 4, 0, sizes=[30, 10], limit=10), 5 * n)) for n in (1, 20)]
    counts = Counter(i for batch in epochs[1] for i in batch)
    assert sum(count for i, count in counts.items() if i < 30) == 200
    assert [counts[i] for i in range(30, 40)] == [20] * 10
    assert len(counts) == 40, "each epoch draws other rows of the large task"
    assert len({i for batch in epochs[0] for i in batch}) == 20, "an epoch has no row twice"
