from __future__ import annotations

import pytest

from tpv import errors

pytestmark = pytest.mark.anyio

TRAIN = [{"source": "good film", "target": "positive"}, {"source": "bad film", "target": "negative"}]
TEST = [{"source": "fine", "target": "positive"}]


async def test_splits_come_back_as_they_were_uploaded(client):
    made = await client.datasets.upload("mr", train=TRAIN, test=TEST, label_words=["negative", "positive"])

    assert (made.version, made.created) == (1, True)
    assert {split.name: split.rows for split in made.splits} == {"train": 2, "test": 1}
    assert await client.datasets.rows("mr", "train") == TRAIN
    assert await client.datasets.rows("mr:1", "test") == TEST


async def test_equal_content_is_one_version_and_other_content_the_next(client):
    first = await client.datasets.upload("mr", train=TRAIN)
    again = await client.datasets.upload("mr", train=TRAIN)
    other = await client.datasets.upload("mr", train=TRAIN, test=TEST)

    assert (again.version, again.created) == (1, False)
    assert other.version == 2
    assert first.fingerprint != other.fingerprint
    assert [found.version async for found in client.datasets.list()] == [2]


@pytest.mark.parametrize(
    ("train", "word"),
    [
        (b"not json\n", "line 1"),
        (b'{"source": "a", "target": "b"}\n{"source": "a"}\n', "line 2"),
        (b'{"source": 1, "target": "b"}\n', "line 1"),
        (b'["a"]\n', "line 1"),
        (b"\n\n", "no rows"),
        (b"\xff\xfe\n", "line 1"),
        (b'{"source": "a", "target": " "}\n', "line 1"),
    ],
)
async def test_a_bad_file_names_its_first_wrong_line(http, train, word):
    answer = await http.post(
        "/api/v1/datasets/default/mr/versions", data={"metadata": "{}"}, files={"train": ("t.jsonl", train)}
    )

    assert answer.status_code == 422
    assert word in answer.json()["detail"]
    assert (await http.get("/api/v1/datasets/default/mr/versions/newest")).status_code == 404


async def test_a_target_that_is_no_label_word_is_refused(client):
    with pytest.raises(errors.InvalidDataset, match="none of the label words"):
        await client.datasets.upload("mr", train=TRAIN, label_words=["good", "bad"])


async def test_a_data_set_without_rows_to_train_on_is_refused(http):
    answer = await http.post(
        "/api/v1/datasets/default/mr/versions",
        data={"metadata": "{}"},
        files={"validation": ("t.jsonl", b'{"source": "a", "target": "b"}')},
    )

    assert answer.status_code == 422
    assert "train" in answer.json()["detail"]
