"""Many vectors in one request are what they would be one by one; all of them or none."""

from __future__ import annotations

import json
import socket
from contextlib import asynccontextmanager

import anyio
import numpy as np
import psycopg
import pytest
import uvicorn
from fastapi import FastAPI
from safetensors.numpy import save
from sqlalchemy import select
from sqlalchemy.orm import undefer
from tests.service.registry.conftest import ROWS, WIDTH, prompt_near

import tpv
from tpv import _bulk, errors, files
from tpv_service.registry.tables import VectorRow, VersionRow

pytestmark = pytest.mark.anyio

OF_ONE_ITEM = ("task", "task_type", "description", "tags", "metrics", "method", "hyperparameters", "provenance")


def prompts_near(start: np.ndarray, seeds: list[int] | range) -> np.ndarray:
    return np.stack([prompt_near(start, seed) for seed in seeds])


async def send(http, items, tensor, *, key=None, **metadata):
    """The request that our client would not send."""
    document = {"initialization": "family", "items": items} | metadata
    headers = {"Idempotency-Key": key} if key else {}
    return await http.post(
        "/api/v1/vectors/bulk",
        data={"metadata": json.dumps(document)},
        files={"file": save(tensor if isinstance(tensor, dict) else {"vectors": tensor})},
        headers=headers,
    )


async def rows_in(app: FastAPI, namespace: str | None = None) -> list[dict]:
    """All that the database knows of versions and their vectors, but ids and times; `namespace` itself left out."""
    hidden = {"id", "vector_id", "created_at", "txid", "deleted_at", "namespace", "version_id"}
    async with app.state["sessions"]() as session:
        statement = select(VersionRow, VectorRow).join(VersionRow.vector).options(undefer(VersionRow.pooled))
        if namespace:
            statement = statement.where(VectorRow.namespace == namespace)
        rows = (await session.execute(statement.order_by(VectorRow.name, VersionRow.number))).all()
    return [
        {
            f"{type(row).__name__}.{column.key}": value.tolist() if isinstance(value, np.ndarray) else value
            for row in pair
            for column in row.__table__.columns
            if column.key not in hidden
            for value in [getattr(row, column.key)]
        }
        for pair in rows
    ]


# --- The law ---------------------------------------------------------------------------------------------------------


def scenario(seed: int) -> tuple[list[dict], list[int], int]:
    """Items whose names and contents repeat, the seeds of their prompts, and how many are registered alone before."""
    random = np.random.default_rng(seed)
    n = int(random.integers(5, 25))
    items = []
    for _ in range(n):
        item: dict = {"name": f"v{random.integers(4)}"}
        if random.random() < 0.5:
            item |= {"description": f"d{random.integers(3)}", "tags": {f"t{random.integers(3)}": str(seed)}}
        if random.random() < 0.5:
            figure = {"dataset": "x", "metric": "accuracy", "value": float(random.integers(2)), "n": 10}
            item["metrics"] = [figure] * int(random.integers(1, 3))
        items.append(item)
    contents = [int(content) for content in random.integers(5, size=n)]
    for item, content in zip(items, contents, strict=True):  # equal contents with other metadata would be a conflict
        if content % 2:
            item |= {"method": f"m{content}", "hyperparameters": {"lr": content}, "provenance": {"seed": content}}
    return items, contents, int(random.integers(0, n // 2))


@pytest.mark.parametrize("kind", ["prompts", "vectors"])
@pytest.mark.parametrize("seed", range(4))
async def test_many_at_once_become_what_they_become_one_by_one(app, client, family, start, seed, kind):
    items, contents, before = scenario(seed)
    tensors = prompts_near(start, contents) - (start if kind == "vectors" else 0)
    answers: dict[str, list] = {"one": [], "many": []}
    for namespace, alone in (("one", len(items)), ("many", before)):
        named = [item | {"name": f"{namespace}/{item['name']}"} for item in items]
        for item, tensor in zip(named[:alone], tensors, strict=False):
            metadata = {key: item[key] for key in OF_ONE_ITEM if key in item}
            given = {kind[:-1]: tensor}
            answers[namespace].append(
                await client.vectors.register(item["name"], initialization="family", **given, **metadata)
            )
        given = {kind: tensors[alone:]}
        answers[namespace] += await client.vectors.register_many(named[alone:], initialization="family", **given)

    assert [(a.name, a.version, a.fingerprint, a.created) for a in answers["many"]] == [
        (a.name, a.version, a.fingerprint, a.created) for a in answers["one"]
    ]
    assert await rows_in(app, "many") == await rows_in(app, "one")
    for answer in {a.reference: a for a in answers["one"]}.values():
        one = await client.vectors.evaluations(answer.reference)
        many = await client.vectors.evaluations(answer.reference.replace("one/", "many/"))
        hidden = {"id", "created_at"}
        assert [e.model_dump(exclude=hidden) for e in many] == [e.model_dump(exclude=hidden) for e in one]


async def test_defaults_hold_for_items_that_tell_nothing_else(client, family, start):
    items = ["a", {"name": "team/b", "task": "rte", "tags": {"x": "2"}}]
    await client.vectors.register_many(
        items, prompts=prompts_near(start, [1, 2]), initialization=family, task="mnli", tags={"x": "1"}, method="pt"
    )

    a, b = await client.vectors.describe("a"), await client.vectors.describe("team/b")
    assert (a.tasks, a.tags, b.tasks, b.tags) == (["mnli"], {"x": "1"}, ["rte"], {"x": "2"})
    assert {(await client.vectors.get(name)).method for name in ("a", "team/b")} == {"pt"}


async def test_vectors_know_their_initialization(client, family, start):
    vectors = [tpv.TaskPromptVector.from_prompt(prompt_near(start, seed), start) for seed in range(3)]
    made = await client.vectors.register_many(["a", "b", "a"], vectors=vectors)

    assert [item.reference for item in made] == ["default/a:1", "default/b:1", "default/a:2"]
    assert [item.fingerprint for item in made] == [vector.fingerprint for vector in vectors]


# --- All or none -----------------------------------------------------------------------------------------------------

TENSOR = np.arange(3 * ROWS * WIDTH, dtype=np.float32).reshape(3, ROWS, WIDTH) / 7


def changed(value: float, dtype: type = np.float32) -> np.ndarray:
    tensor = TENSOR.astype(dtype)
    tensor[1, 2, 3] = value
    return tensor


#: tensor, what is told of item 1, status, words of the problem; `index` and `name` tell of item 1 where it is to blame
BAD_ITEMS = {
    "not a number": (changed(np.nan), {}, 422, "NaN"),
    "infinite": (changed(-np.inf), {}, 422, "infinite"),
    "beyond float32": (changed(1e300, np.float64), {}, 422, "infinite"),
    "wrong fingerprint": (TENSOR, {"fingerprint": "sha256:" + "0" * 64}, 422, "declares"),
    "another task": (TENSOR, {"name": "old", "task": "another"}, 409, "another task"),
    "deleted vector": (TENSOR, {"name": "gone"}, 409, "tpv vector restore"),
    "deleted version": ("old:1", {"name": "old"}, 409, "tpv vector restore"),
    "other metadata": ("old:2", {"name": "old", "hyperparameters": {"lr": 2}}, 409, "hyperparameters"),
    "other metadata in one request": ("item 0", {"name": "a", "hyperparameters": {"lr": 2}}, 409, "hyperparameters"),
}
BAD_REQUESTS = {
    "wrong rows": (TENSOR[:, 1:], {}, 422, "num_virtual_tokens"),
    "wrong width": (TENSOR[:, :, 1:], {}, 422, "num_virtual_tokens"),
    "one tensor too few": (TENSOR[:2], {}, 422, "3 items"),
    "not stacked": (TENSOR[0], {}, 422, "shape"),
    "a number": (np.array(np.nan), {}, 422, "NaN"),
    "two tensors": ({"vectors": TENSOR, "prompts": TENSOR}, {}, 422, "one tensor"),
    "other tensor": ({"vector": TENSOR}, {}, 422, "one tensor"),
    "no name": (TENSOR, {"name": "Not A Name"}, 422, "items.1.name"),
    "a version": (TENSOR, {"name": "old:1"}, 422, "items.1.name"),
    "an id": (TENSOR, {"name": "01900000-0000-7000-8000-000000000000"}, 422, "items.1.name"),
    "unknown member": (TENSOR, {"colour": "red"}, 422, "items.1.colour"),
    "zero byte": (TENSOR, {"description": "a\0b"}, 422, "cannot be stored"),
    "zero byte in the version": (TENSOR, {"method": "a\0b"}, 422, "cannot be stored"),
    "zero byte in JSON": (TENSOR, {"provenance": {"a": "\0"}}, 422, "cannot be stored"),
}


@pytest.mark.parametrize("case", BAD_ITEMS | BAD_REQUESTS)
async def test_one_bad_item_refuses_all_and_leaves_no_row(app, http, client, family, start, case):
    await client.vectors.register_many(
        ["old", "old", "gone"], prompts=prompts_near(start, [7, 8, 9]), initialization="family", task="t"
    )
    await client.vectors.delete("old:1")
    await client.vectors.delete("gone")
    before = await rows_in(app)
    tensor, told, status, words = (BAD_ITEMS | BAD_REQUESTS)[case]
    if isinstance(tensor, str):
        equal = {"old:1": prompt_near(start, 7) - start, "old:2": prompt_near(start, 8) - start, "item 0": TENSOR[0]}
        tensor = np.stack([TENSOR[0], equal[tensor], TENSOR[2]])
    items = [{"name": "a"}, {"name": "b", **told}, {"name": "c"}]

    answer = await send(http, items, tensor, defaults={"hyperparameters": {"lr": 1}} if "one request" in case else {})

    problem = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert (answer.status_code, problem["status"]) == (status, status)
    assert words in problem["detail"]
    if case in BAD_ITEMS:
        assert problem["index"] == 1
        assert problem["name"] == f"default/{items[1]['name']}"
        assert f"item 1 (default/{items[1]['name']})" in problem["detail"]
    assert await rows_in(app) == before


async def test_an_item_that_leaves_the_range_with_its_initialization_is_named(http, client, start):
    largest = np.full_like(start, np.finfo(np.float32).max)
    await client.initializations.create("huge", base_model="tiny-t5", revision="a" * 40, tensor=largest)
    answer = await send(http, [{"name": "a"}, {"name": "b"}], np.stack([-largest, largest]), initialization="huge")

    assert answer.status_code == 422
    assert (answer.json()["index"], answer.json()["name"]) == (1, "default/b")
    assert "range of float32" in answer.json()["detail"]


@pytest.mark.parametrize("items", [[], [{"name": "a"}] * 5001])
async def test_too_few_and_too_many_items_are_refused(http, family, items):
    answer = await send(http, items, np.zeros((len(items), ROWS, WIDTH), np.float32))

    assert answer.status_code == 422
    assert "items" in answer.json()["detail"]


# --- Repeated, and at once -------------------------------------------------------------------------------------------


async def test_one_idempotency_key_has_one_effect(app, http, family):
    items = [{"name": "a"}, {"name": "b"}, {"name": "a"}]
    first = await send(http, items, TENSOR, key="k")
    again = await send(http, items, TENSOR, key="k")
    other = await send(http, items, TENSOR + 1, key="k")
    renamed = await send(http, [{"name": "c"}, *items[1:]], TENSOR, key="k")

    assert first.status_code == again.status_code == 201
    assert first.json() == again.json()
    assert [item["created"] for item in again.json()["items"]] == [True] * 3
    assert {other.json()["type"], renamed.json()["type"]} == {"urn:tpv:problem:idempotency-conflict"}
    assert len(await rows_in(app)) == 3


async def test_when_nothing_is_new_the_answer_is_a_200(http, family):
    items = [{"name": "a"}, {"name": "b"}, {"name": "a"}]
    assert (await send(http, items, TENSOR)).status_code == 201
    again = await send(http, items, TENSOR)

    assert again.status_code == 200
    assert [item["created"] for item in again.json()["items"]] == [False] * 3


async def test_overlapping_requests_at_once_leave_no_gap_and_no_duplicate(client, family, start):
    """Eight writers, each with its own order of the same names, and contents that some of them share."""
    names = [f"v{i}" for i in range(12)]
    made: list = []

    async def write(writer: int) -> None:
        random = np.random.default_rng(writer)
        order = [names[i] for i in random.permutation(len(names))] + ["v0"]
        contents = [(writer % 4) * 100 + int(name[1:]) for name in order]
        if writer % 2:
            contents = [content + 1000 * writer for content in contents]
        prompts = prompts_near(start, contents)
        made.extend(await client.vectors.register_many(order, prompts=prompts, initialization="family"))

    async def write_alone(writer: int) -> None:
        for name in names[::-1]:
            prompt = prompt_near(start, 10_000 + writer * 100 + int(name[1:]))
            made.append(await client.vectors.register(name, prompt=prompt, initialization="family"))

    async with anyio.create_task_group() as group:
        for writer in range(8):
            group.start_soon(write, writer)
        group.start_soon(write_alone, 1)

    for name in names:
        found = [version.version async for version in client.vectors.versions(name)]
        # Writers 0 and 4, and 2 and 6, send the same; the four odd ones and the one that writes alone do not.
        assert sorted(found) == list(range(1, 8))
        of_name = [item for item in made if item.name == name]
        assert sorted(item.version for item in of_name if item.created) == list(range(1, 8))
        assert len({(item.version, item.fingerprint) for item in of_name}) == 7


async def test_a_large_set_goes_in_several_requests(client, family, start, monkeypatch):
    monkeypatch.setattr(_bulk, "UPLOAD", 3 * start.nbytes)
    made = await client.vectors.register_many(
        [f"v{i}" for i in range(10)], prompts=prompts_near(start, range(10)), initialization="family"
    )
    assert [item.reference for item in made] == [f"default/v{i}:1" for i in range(10)]

    # The second request of three is refused: the first one stays, the third one is not sent.
    with pytest.raises(errors.VersionConflict, match=r"item 1 \(default/v4\)") as caught:
        await client.vectors.register_many(
            [{"name": f"{'v' if i == 4 else 'w'}{i}", "task": "another"} for i in range(9)],
            prompts=prompts_near(start, range(9)),
            initialization="family",
        )
    assert caught.value.extra["index"] == 1
    assert [vector.name async for vector in client.vectors.list(task="another")] == ["w0", "w1", "w2"]


# --- Download --------------------------------------------------------------------------------------------------------


async def test_what_was_registered_comes_back_in_the_order_asked_for(client, family, start):
    n = 600  # more than one request
    names = [f"v{i:03}" for i in range(n)]
    prompts = prompts_near(start, range(n))
    made = await client.vectors.register_many(names, prompts=prompts, initialization="family")
    await client.vectors.set_alias("v007", "best", 1)
    order = [int(i) for i in np.random.default_rng(0).permutation(n)] + [7, 7]
    references = [made[i].reference for i in order[:-2]] + ["v007@best", await client.vectors.get("v007")]

    loaded = await client.vectors.load_many(references)

    np.testing.assert_array_equal([vector.tensor for vector in loaded], (prompts - start)[order])
    assert {vector.initialization for vector in loaded} == {family.fingerprint}
    assert await client.vectors.load_many([]) == []


async def test_a_download_is_a_safetensors_file_that_tells_what_it_holds(http, client, family, start):
    made = await client.vectors.register_many(["a", "b"], prompts=prompts_near(start, [1, 2]), initialization="family")
    answer = await http.post("/api/v1/vectors/bulk/content", json={"references": ["b", "a"]})

    assert int(answer.headers["content-length"]) == len(answer.content)
    assert files.load(answer.content)["vectors"].shape == (2, ROWS, WIDTH)
    assert json.loads(files.metadata(answer.content)["versions"]) == [
        {"reference": item.reference, "fingerprint": item.fingerprint, "initialization": family.fingerprint}
        for item in (made[1], made[0])
    ]


async def test_all_that_is_missing_is_named(client, family, start):
    await client.vectors.register("a", prompt=prompt_near(start, 1), initialization="family")
    with pytest.raises(errors.NotFound, match=r"default/b.*c:7|b.*c:7"):
        await client.vectors.load_many(["a", "b", "c:7"])


@pytest.fixture
async def mixed(client, family, start) -> list[str]:
    """Vectors of two initializations of one model, and of one with another shape."""
    create = client.initializations.create
    await create("other", base_model="tiny-t5", revision="a" * 40, tensor=start + 1)
    await create("longer", base_model="tiny-t5", revision="a" * 40, tensor=np.vstack([start, start]))
    await client.vectors.register_many(
        [f"a{i}" for i in range(300)], prompts=prompts_near(start, range(300)), initialization="family"
    )
    await client.vectors.register("b", prompt=start, initialization="other")
    await client.vectors.register("c", prompt=np.vstack([start, start]), initialization="longer")
    return [f"a{i}" for i in range(300)]


async def test_initializations_are_mixed_only_when_asked_for(client, mixed, start):
    for references in (["a0", "b"], [*mixed, "b"]):  # in one request and over several
        with pytest.raises(errors.IncompatibleVectors, match=r"default/family.*default/other") as caught:
            await client.vectors.load_many(references)
        assert "default/a0:1" in str(caught.value)
        assert "default/b:1" in str(caught.value)
        loaded = await client.vectors.load_many(references, allow_mixed_initializations=True)
        assert loaded[-1].initialization == files.fingerprint(start + 1)
        np.testing.assert_array_equal(loaded[-1].tensor, start - (start + 1))
    with pytest.raises(errors.IncompatibleVectors, match="num_virtual_tokens"):
        await client.vectors.load_many([*mixed, "c"], allow_mixed_initializations=True)


@asynccontextmanager
async def served(app: FastAPI):
    """The application behind a real server; gives its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="critical"))
        async with anyio.create_task_group() as group:
            group.start_soon(server.serve, [listener])
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
            server.should_exit = True


@pytest.mark.parametrize("at", [0, 39])
async def test_a_damaged_vector_breaks_the_download_off(app, client, family, start, settings, monkeypatch, at):
    monkeypatch.setattr("tpv_service.registry.bulk.BLOCK", 4 * start.nbytes)
    names = [f"v{i}" for i in range(40)]
    await client.vectors.register_many(names, prompts=prompts_near(start, range(40)), initialization="family")
    digest = (await client.vectors.get(names[at])).digest.removeprefix("sha256:")
    path = settings.blob_directory / digest[:2] / digest[2:]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)

    async with served(app) as url, tpv.AsyncClient(url, retries=0) as real:
        with pytest.raises(errors.ConnectionFailed, match=r"broke off.*tpv admin verify"):
            await real.vectors.load_many(names)
        assert len(await real.vectors.load_many([name for name in names if name != names[at]])) == 39


async def test_a_download_holds_no_connection_to_the_database(app, http, client, family, start, postgres_url):
    await client.vectors.register_many(["a", "b"], prompts=prompts_near(start, [1, 2]), initialization="family")
    held = []

    def counted(digest: str) -> bytes:
        with psycopg.connect(postgres_url, autocommit=True) as connection:
            held.append(
                connection.execute("select count(*) from pg_stat_activity where state like 'idle in%'").fetchone()[0]
            )
        return get(digest)

    store = app.state["store"]
    get, store.get = store.get, counted
    answer = await http.post("/api/v1/vectors/bulk/content", json={"references": ["a", "b"]})

    assert answer.status_code == 200
    assert held == [0, 0]
