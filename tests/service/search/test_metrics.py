"""Every metric, kind of query and pool, against the mathematics of `tpv` on the same vectors."""

from __future__ import annotations

import csv
from io import StringIO

import httpx
import numpy as np
import pytest
from tests.service.search.conftest import ROWS, SOURCES, WIDTH

import tpv
from tpv import errors
from tpv.schemas.filters import Filter
from tpv.schemas.similarity import FLAT_LIMIT, Pool
from tpv.similarity import METRICS, pool, similarity

pytestmark = pytest.mark.anyio


def expected(metric: str, query: np.ndarray, vectors: dict[str, np.ndarray], start: np.ndarray) -> dict[str, float]:
    """Similarities of all vectors but `rte` to a query, by the functions of `tpv.similarity`."""
    sources = {name: vector for name, vector in vectors.items() if name != "rte"}
    stacked = np.stack(list(sources.values()))
    options = {}
    if metric.endswith("-centered"):
        options["center"] = pool(stacked).mean(axis=0)
    if metric == "cosine-prompt":
        options["initialization"] = start
    values = similarity(stacked, query, metric, **options)
    return dict(zip(sources, values.tolist(), strict=True))


@pytest.mark.parametrize("metric", METRICS)
async def test_a_search_is_what_the_mathematics_gives(client, vectors, start, metric):
    answer = await client.similarity.search("rte", k=SOURCES, metric=metric)
    values = expected(metric, vectors["rte"], vectors, start)

    assert [hit.reference for hit in answer.hits] == [f"default/{n}:1" for n in sorted(values, key=values.get)[::-1]]
    np.testing.assert_allclose([hit.similarity for hit in answer.hits], sorted(values.values())[::-1], rtol=1e-4)
    assert (answer.pool.metric, answer.pool.exact) == (metric, True)


@pytest.mark.parametrize("metric", METRICS)
async def test_a_matrix_is_what_the_mathematics_gives(client, vectors, start, metric):
    names = list(vectors)
    stacked = np.stack(list(vectors.values()))
    options = {"center": pool(stacked).mean(axis=0)} if metric.endswith("-centered") else {}
    options |= {"initialization": start} if metric == "cosine-prompt" else {}
    answer = await client.similarity.matrix(names, metric=metric)

    np.testing.assert_allclose(answer.matrix, similarity(stacked, stacked, metric, **options), rtol=1e-4, atol=1e-5)
    assert sorted(answer.order) == list(range(len(names)))


async def test_a_matrix_puts_similar_ones_side_by_side_and_is_normalized_on_request(client, vectors):
    await client.vectors.register("twin", vector=vectors["s03"] * 1.01, initialization="family")
    names = [*vectors, "twin"]
    answer = await client.similarity.matrix(names, metric="cosine", normalize=True)
    places = [answer.order.index(names.index(name)) for name in ("s03", "twin")]

    assert abs(places[0] - places[1]) == 1
    assert (np.min(answer.matrix), np.max(answer.matrix)) == (0, 1)


async def test_a_matrix_as_csv_has_similar_ones_side_by_side_and_says_what_it_is(
    client, http: httpx.AsyncClient, vectors
):
    body = {"references": list(vectors), "metric": "cosine", "normalize": True}
    answer = await client.similarity.matrix(**body)
    text = (await http.post("/api/v1/similarity/matrix", params={"format": "csv"}, json=body)).raise_for_status()
    (title, *header), *rows = csv.reader(StringIO(text.text))

    assert text.headers["content-type"].startswith("text/csv")
    assert title == "cosine, exact, min-max normalized, default/family"
    assert answer.order != sorted(answer.order)
    assert header == [row[0] for row in rows] == [answer.references[i] for i in answer.order]
    assert [[float(value) for value in row[1:]] for row in rows] == [
        [answer.matrix[i][j] for j in answer.order] for i in answer.order
    ]


async def test_a_centred_matrix_as_csv_says_what_was_subtracted(http: httpx.AsyncClient, vectors):
    body = {"references": ["rte", "s00"], "metric": "dot-centered", "reference_pool": {"references": list(vectors)}}
    text = (await http.post("/api/v1/similarity/matrix", params={"format": "csv"}, json=body)).raise_for_status().text

    assert text.startswith('"dot-centered, exact, default/family, less the mean of 13 (the references given)"')


async def test_newest_is_the_newest_of_an_initialization_that_is_asked_for(client, vectors, start):
    await client.initializations.create("other", base_model="tiny-t5", revision="a" * 40, tensor=start + 1)
    await client.vectors.register("s00", vector=vectors["s00"], initialization="other")
    asked = {"names": ["s00", "s01"], "initialization": "family"}

    matrix = await client.similarity.matrix(**asked)
    found = [one.version async for one in client.vectors.search(**asked)]
    newest = [one.version async for one in client.vectors.search(names=asked["names"])]
    pool = await client.similarity.search("rte", names=asked["names"])
    assert sorted(matrix.references) == ["default/s00:1", "default/s01:1"]
    assert (found, newest) == ([1, 1], [2, 1])
    assert {hit.reference for hit in pool.hits} == {"default/s00:1", "default/s01:1"}


async def test_a_matrix_takes_what_passes_a_filter(client, vectors):
    odd = await client.similarity.matrix(task_type="odd")

    assert odd == await client.similarity.matrix([f"s{i:02}" for i in range(0, SOURCES, 2)])
    with pytest.raises(errors.Invalid, match="no vector passes the filter"):
        await client.similarity.matrix(task="nobody's")
    with pytest.raises(errors.Invalid, match="references, or a filter"):
        await client.similarity.matrix()


async def test_a_matrix_has_a_limit(client, vectors, monkeypatch):
    monkeypatch.setattr("tpv.schemas.similarity.FLAT_LIMIT", 2)
    with pytest.raises(errors.Invalid, match="cosine-flat compares at most 2 vectors, these are more; cosine takes"):
        await client.similarity.matrix(task_type="odd", metric="cosine-flat")


async def test_centred_answers_say_what_was_subtracted(client, vectors):
    sources = [f"s{i:02}" for i in range(SOURCES)]
    found = await client.similarity.search("rte", metric="dot-centered")
    named = await client.similarity.search("rte", metric="dot-centered", reference_pool=sources)
    matrix = await client.similarity.matrix(sources, metric="dot-centered")
    plain = await client.similarity.search("rte")

    assert found.pool.reference_pool.size == SOURCES
    assert "newest" in found.pool.reference_pool.rule
    assert (named.pool.reference_pool.rule, named.pool.reference_pool.size) == ("the references given", SOURCES)
    assert matrix.reference_pool.size == SOURCES + 1
    assert plain.pool.reference_pool is None


async def test_a_combination_is_compared_as_its_sum(client, vectors, start):
    answer = await client.similarity.search({"rte": 1.5, "s00": -2}, k=SOURCES)
    query = np.float32(1.5) * vectors["rte"] - 2 * vectors["s00"]
    values = expected("dot", query, vectors, start)
    del values["s00"]

    assert answer.query == "+1.5 default/rte:1 -2 default/s00:1"
    assert [hit.reference for hit in answer.hits] == [f"default/{n}:1" for n in sorted(values, key=values.get)[::-1]]
    assert answer.pool.excluded == {
        "default/rte:1": "a term of the target",
        "default/s00:1": "a term of the target",
    }


@pytest.mark.parametrize("metric", ["dot", "cosine-flat"])
async def test_a_vector_that_is_not_registered_is_compared(client, vectors, start, metric):
    own = tpv.TaskPromptVector.from_prompt(start + vectors["s05"] + 0.01, start)
    answer = await client.similarity.search(own, k=3, metric=metric)

    assert "default/s05:1" in [hit.reference for hit in answer.hits]
    assert (answer.query, answer.pool.excluded) == ("the uploaded vector", {})


async def test_an_uploaded_vector_has_to_fit(client, vectors):
    initialization = (await client.vectors.get("rte")).initialization.fingerprint
    with pytest.raises(errors.InvalidTensor, match=r"\[2, 2\].*\[3, 5\]"):
        await client.similarity.search(tpv.TaskPromptVector(np.ones((2, 2)), initialization))
    with pytest.raises(errors.NotFound, match="no initialization"):
        await client.similarity.search(tpv.TaskPromptVector(np.ones((ROWS, WIDTH)), "sha256:" + "0" * 64))


@pytest.mark.parametrize(
    ("conditions", "passing"),
    [
        ({"task_type": "odd"}, [1, 3, 5, 7, 9, 11]),
        ({"tags": {"i": "4"}}, [4]),
        ({"metrics": [{"metric": "accuracy", "at_least": 0.1}]}, [10, 11, 12]),
        ({"names": ["s01", "s02"]}, [2, 3]),
        ({"candidates": Filter.model_validate({"not": {"task_type": "odd"}})}, [2, 4, 6, 8, 10, 12]),
        ({"candidates": Filter(task_type="odd"), "names": ["s00", "s01"]}, [1]),
        ({"namespace": "nowhere"}, []),
    ],
)
async def test_only_what_passes_the_filter_is_a_candidate(client, vectors, conditions, passing):
    answer = await client.similarity.search("rte", k=100, **conditions)
    names = list(vectors)

    assert {hit.reference for hit in answer.hits} == {f"default/{names[i]}:1" for i in passing}
    assert answer.pool.size == len(passing)


async def test_all_versions_or_those_with_an_alias_are_candidates_on_request(client, vectors):
    await client.vectors.register("s00", vector=vectors["s00"] + 1, initialization="family")
    await client.vectors.set_alias("s00", "best", 1)
    every = await client.similarity.search("rte", k=100, versions="all")
    best = await client.similarity.search("rte", k=100, versions="alias:best")

    assert {"default/s00:1", "default/s00:2"} < {hit.reference for hit in every.hits}
    assert [hit.reference for hit in best.hits] == ["default/s00:1"]


async def test_equal_similarities_rank_by_reference(client, vectors):
    for name in ("zz", "aa", "mm"):
        await client.vectors.register(name, vector=vectors["s04"], initialization="family")
    names = ("aa", "mm", "s04", "zz")
    hits = (await client.similarity.search("rte", k=100)).hits
    group = await client.groupings.create("rte", strategy="all")

    assert [hit.reference for hit in hits if hit.reference[8:-2] in names] == [f"default/{n}:1" for n in names]
    assert [m.reference for m in group.members if m.reference[8:-2] in names] == [f"default/{n}:1" for n in names]
    place = [hit.reference for hit in hits].index("default/aa:1")
    cut = await client.similarity.search("rte", k=place + 2)
    assert [hit.reference for hit in cut.hits[place:]] == ["default/aa:1", "default/mm:1"]


async def test_a_small_reference_pool_is_refused(client, vectors):
    few = ["s00", "s01", "s02"]
    with pytest.raises(errors.Invalid, match=r"has 3 vectors.*at least 10"):
        await client.similarity.search("rte", metric="cosine-centered", reference_pool=few)
    with pytest.raises(errors.Invalid, match="centred metrics"):
        await client.similarity.search("rte", metric="cosine", reference_pool=few)


async def test_the_centre_is_that_of_the_pool_that_is_named(client, vectors):
    names = [f"s{i:02}" for i in range(10)]
    answer = await client.similarity.search("rte", k=1, metric="dot-centered", candidates=["s11"], reference_pool=names)
    center = pool(np.stack([vectors[name] for name in names])).mean(axis=0)
    value = similarity(vectors["s11"], vectors["rte"], "dot-centered", center=center)

    assert answer.hits[0].similarity == pytest.approx(float(value), rel=1e-4)


async def test_a_large_pool_is_compared_whole_only_as_far_as_it_looks_similar(client, vectors, monkeypatch):
    monkeypatch.setattr("tpv_service.search.endpoints.FLAT_LIMIT", 4)
    answer = await client.similarity.search("rte", k=2, metric="cosine-flat")

    assert (answer.pool.exact, len(answer.hits)) == (False, 2)
    assert answer.pool.how == "the 4 with the largest cosine of pooled vectors were compared whole"
    with pytest.raises(errors.Invalid, match="exactly at most 4; here are 12"):
        await client.similarity.search("rte", metric="cosine-flat", accuracy="exact")
    with pytest.raises(errors.Invalid, match=f"at most {FLAT_LIMIT}"):
        await client.similarity.matrix(["rte"] * (FLAT_LIMIT + 1), metric="cosine-flat")
    equal = await client.similarity.search({"rte": 0}, k=2, metric="cosine-flat")
    assert equal.pool.how == answer.pool.how
    assert [hit.reference for hit in equal.hits] == ["default/s00:1", "default/s01:1"]


async def test_of_very_many_equal_ones_the_oldest_come_first(client, vectors, monkeypatch):
    monkeypatch.setattr("tpv_service.search.scores.TIES", 3)
    for name in ("b", "a"):
        await client.vectors.register(name, vector=np.zeros((ROWS, WIDTH), np.float32), initialization="family")
    found = await client.similarity.search({"rte": 0}, k=3)
    group = await client.groupings.create("b", strategy="all")

    assert [hit.reference for hit in found.hits] == ["default/s00:1", "default/s01:1", "default/s02:1"]
    names = ["rte", *(f"s{i:02}" for i in range(SOURCES)), "a"]
    assert [member.reference for member in group.members] == [f"default/{name}:1" for name in names]


async def test_of_many_that_are_left_out_some_are_named(client, vectors, monkeypatch):
    for i in range(3):
        await client.vectors.register(f"own{i}", vector=vectors["s00"] + i, initialization="family", task="task-rte")
    monkeypatch.setattr("tpv_service.search.queries.LISTED", 2)
    for candidates in (None, [*vectors, "own0", "own1", "own2"]):
        answer = await client.similarity.search("rte", candidates=candidates, k=100)

        assert answer.pool.excluded == {
            "default/own0:1": "the target's own task",
            "default/rte:1": "the target itself",
        }
        assert (answer.pool.excluded_total, answer.pool.size) == (4, SOURCES)


async def test_products_beyond_float32_are_refused(client, vectors):
    for name in ("huge", "huge-too"):
        await client.vectors.register(name, vector=np.full((ROWS, WIDTH), 1e30, np.float32), initialization="family")
    for call in (
        client.similarity.matrix(["huge", "huge-too"]),
        client.similarity.search("huge", k=1, allow_same_task=True, versions="all"),
        client.groupings.create("huge", ["huge-too"]),
    ):
        with pytest.raises(errors.Invalid, match="leave the range of float32"):
            await call
    for metric in ("cosine", "cosine-flat"):  # an angle is none the less one
        matrix = await client.similarity.matrix(["huge", "huge-too", "s00"], metric=metric)
        found = await client.similarity.search("huge", candidates=["huge-too"], metric=metric)
        assert matrix.matrix[0][1] == found.hits[0].similarity == pytest.approx(1)


async def test_a_pool_says_all_by_itself(client, vectors):
    with pytest.raises(TypeError, match="a Pool says all"):
        await client.similarity.search("rte", candidates=Pool(references=["s00"]), task_type="odd")
