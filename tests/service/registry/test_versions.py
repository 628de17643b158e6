"""Registering, reading, deleting and restoring versions, through the published client."""

from __future__ import annotations

import anyio
import numpy as np
import pytest
from sqlalchemy import event
from sqlalchemy.orm import Session
from tests.service.registry.conftest import prompt_near

import tpv
from tpv import errors, files

pytestmark = pytest.mark.anyio


async def register(client: tpv.AsyncClient, start: np.ndarray, seed: int = 1, name: str = "mnli", **metadata):
    metadata.setdefault("initialization", "family")
    return await client.vectors.register(name, prompt=prompt_near(start, seed), **metadata)


async def test_a_registered_prompt_is_kept_as_its_vector(client, family, start):
    made = await register(client, start, task="catalog:glue/mnli", task_type="nli", tags={"team": "a"})
    vector = await (await client.vectors.get("mnli")).load()

    assert made.created
    assert made.version == 1
    assert made.actor == "local"
    assert made.initialization.name == "family"
    np.testing.assert_array_equal(vector.tensor, prompt_near(start, 1) - start)
    assert vector.fingerprint == made.fingerprint
    assert vector.initialization == family.fingerprint
    assert made.reconstruction_error <= 1e-6


async def test_versions_count_up_and_equal_content_is_found_again(client, family, start):
    first, second = await register(client, start, 1), await register(client, start, 2)
    again = await register(client, start, 1)

    assert [first.version, second.version, again.version] == [1, 2, 1]
    assert not again.created
    assert (await register(client, start, 3)).version == 3


async def test_a_prompt_and_its_vector_are_one_version(client, family, start):
    first = await register(client, start)
    again = await client.vectors.register("mnli", vector=tpv.TaskPromptVector.from_prompt(prompt_near(start, 1), start))

    assert again.version == first.version
    assert not again.created


async def test_equal_content_with_other_metadata_is_a_conflict(client, family, start):
    await register(client, start, hyperparameters={"lr": 0.3})
    with pytest.raises(errors.VersionConflict) as caught:
        await register(client, start, hyperparameters={"lr": 0.5})

    assert caught.value.extra["differences"] == {"hyperparameters": [{"lr": 0.3}, {"lr": 0.5}]}


async def test_many_writers_of_one_name_get_every_number_once(client, family, start):
    found: list[int] = []

    async def write(seed: int) -> None:
        found.append((await register(client, start, seed)).version)

    async with anyio.create_task_group() as group:
        for seed in range(32):
            group.start_soon(write, seed)

    assert sorted(found) == list(range(1, 33))


async def test_metrics_become_evaluations(client, family, start):
    metric = {"dataset": "catalog:glue/mnli", "metric": "accuracy", "value": 0.86, "seed": 0, "n": 1000}
    made = await register(client, start, metrics=[metric])

    (evaluation,) = await client.vectors.evaluations("mnli:1")
    assert evaluation.value == 0.86
    assert evaluation.id == made.evaluations[0].id


async def test_parents_are_pinned_to_the_version_they_meant(client, family, start):
    await register(client, start, 1, "mnli")
    await register(client, start, 2, "mnli")
    made = await register(client, start, 3, "rte", parents=[{"reference": "mnli", "role": "source", "weight": 0.5}])

    assert [(p.reference, p.weight) for p in made.parents] == [("default/mnli:2", 0.5)]
    with pytest.raises(errors.InUse, match="descendant default/rte:1"):
        await client.vectors.delete("mnli:2")


async def test_deleting_is_soft_and_numbers_are_never_used_again(client, family, start):
    await register(client, start, 1)
    await register(client, start, 2)
    await client.vectors.delete("mnli:2")

    assert (await client.vectors.get("mnli")).version == 1
    with pytest.raises(errors.VersionConflict, match="tpv vector restore default/mnli:2"):
        await register(client, start, 2)
    assert (await register(client, start, 3)).version == 3
    await client.vectors.restore("mnli:2")
    assert [v.version async for v in client.vectors.versions("mnli")] == [3, 2, 1]


async def test_a_whole_vector_is_deleted_and_restored(client, family, start):
    await register(client, start)
    await client.vectors.delete("mnli")

    assert [v.name async for v in client.vectors.list()] == []
    with pytest.raises(errors.NotFound):
        await client.vectors.get("mnli:1")
    with pytest.raises(errors.Conflict, match="restore"):
        await register(client, start, 2)
    await client.vectors.restore("mnli")
    assert (await client.vectors.get("mnli")).version == 1


async def test_lists_filter_by_task_tag_and_base_model(client, family, start):
    await register(client, start, 1, "a", task="t1", tags={"team": "x"})
    await register(client, start, 2, "b", task=["t1", "t2"], task_type="nli")

    async def names(**filters):
        return [v.name async for v in client.vectors.list(**filters)]

    assert await names() == ["a", "b"]
    assert await names(task="t2") == ["b"]
    assert await names(task_type="nli") == ["b"]
    assert await names(tags={"team": "x"}) == ["a"]
    assert await names(base_model="tiny-t5") == ["a", "b"]
    assert await names(base_model="other") == []


async def test_description_and_tags_change_what_is_not_given_stays(client, family, start):
    await register(client, start, description="old", tags={"a": "1"})
    await client.vectors.update("mnli", description="new")
    found = await client.vectors.describe("mnli")

    assert (found.description, found.tags) == ("new", {"a": "1"})


async def test_content_answers_etag_and_ranges(client, http, family, start):
    made = await register(client, start)
    url = "/api/v1/vectors/default/mnli/versions/1/content"
    whole = await http.get(url)

    assert whole.headers["etag"] == f'"{made.digest}"'
    assert files.digest(whole.content) == made.digest
    assert (await http.get(url, headers={"If-None-Match": whole.headers["etag"]})).status_code == 304
    part = await http.get(url, headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, whole.content[10:20])
    assert part.headers["content-range"] == f"bytes 10-19/{len(whole.content)}"
    assert (await http.get(url, headers={"Range": "bytes=-5"})).content == whole.content[-5:]
    assert (await http.get(url, headers={"Range": f"bytes={len(whole.content)}-"})).status_code == 416


async def test_a_damaged_blob_is_reported_and_never_served(client, http, settings, family, start):
    made = await register(client, start)
    name = made.digest.removeprefix("sha256:")
    path = settings.blob_directory / name[:2] / name[2:]
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    answer = await http.get("/api/v1/vectors/default/mnli/versions/1/content")

    assert answer.status_code == 500
    assert answer.json()["type"] == "urn:tpv:problem:damaged-content"


async def test_one_idempotency_key_has_one_effect(http, client, family, start):
    def ask(seed: int):
        return http.post(
            "/api/v1/vectors/default/mnli/versions",
            data={"metadata": '{"initialization": "family"}'},
            files={"file": files.dump({"prompt": prompt_near(start, seed)})},
            headers={"Idempotency-Key": "k"},
        )

    first, again, other = await ask(1), await ask(1), await ask(2)

    assert (first.status_code, first.json()) == (again.status_code, again.json())
    assert other.status_code == 409
    assert other.json()["type"] == "urn:tpv:problem:idempotency-conflict"


async def test_a_failing_commit_is_an_error_and_never_a_201(app, http, client, family, start):
    def fail(session) -> None:
        raise RuntimeError("the disk is full")

    event.listen(Session, "before_commit", fail)
    try:
        answer = await http.post(
            "/api/v1/vectors/default/mnli/versions",
            data={"metadata": '{"initialization": "family"}'},
            files={"file": files.dump({"prompt": prompt_near(start, 1)})},
        )
    finally:
        event.remove(Session, "before_commit", fail)

    assert answer.status_code == 500
    assert (await http.get("/api/v1/vectors/default/mnli")).status_code == 404
