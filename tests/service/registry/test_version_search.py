"""`POST /vectors/search` through the published client: what is found, in which order, page by page."""

from __future__ import annotations

import httpx
import pytest
from tests.service.registry.conftest import prompt_near

import tpv
from tpv import errors
from tpv.schemas.filters import Filter, MetricKey, SortKey

pytestmark = pytest.mark.anyio

FIGURES = {"a": 0.5, "b": 0.25, "c": None, "d": 0.5, "e": 0.75, "f": None, "g": 0.0, "h": -1.5}
BY_ACCURACY = "default/cr:1/test/accuracy"


def figure(value: float, split: str = "test") -> dict[str, object]:
    return {"dataset": "default/cr:1", "split": split, "metric": "accuracy", "value": value}


@pytest.fixture
async def vectors(client: tpv.AsyncClient, family, start) -> list[str]:
    """Eight vectors, six of them with an accuracy; `c` and `e` have two versions."""
    for seed, (name, value) in enumerate(FIGURES.items()):
        metrics = [] if value is None else [figure(value), figure(9.0, "validation")]
        for version in range(2 if name in "ce" else 1):
            await client.vectors.register(
                name,
                prompt=prompt_near(start, 10 * seed + version),
                initialization="family",
                metrics=metrics,
                task="odd" if seed % 2 else "even",
            )
    return list(FIGURES)


async def found(client: tpv.AsyncClient, *arguments, **members) -> list[str]:
    return [v.reference.removeprefix("default/") async for v in client.vectors.search(*arguments, **members)]


async def test_the_newest_version_of_each_vector_is_found_by_name(client, vectors):
    assert await found(client) == ["a:1", "b:1", "c:2", "d:1", "e:2", "f:1", "g:1", "h:1"]
    assert await found(client, versions="all", names=["c", "e"]) == ["c:1", "c:2", "e:1", "e:2"]


async def test_filters_and_conditions_hold_together(client, vectors):
    tree = {"any": [{"names": ["a", "c"]}, {"metrics": [{"metric": "accuracy", "at_most": 0.3}]}]}

    assert await found(client, tree) == ["a:1", "b:1", "c:2", "g:1", "h:1"]
    assert await found(client, Filter.model_validate(tree), task="even") == ["a:1", "c:2", "g:1"]
    assert await found(client, Filter(not_=Filter.model_validate(tree))) == ["d:1", "e:2", "f:1"]


async def test_a_vector_whose_newest_version_does_not_pass_is_not_found_by_an_older_one(client, vectors, start):
    await client.vectors.register("a", prompt=prompt_near(start, 99), initialization="family")
    above = {"metrics": [{"metric": "accuracy", "split": "test", "at_least": 0.4}]}

    assert await found(client, above) == ["d:1", "e:2"]
    assert await found(client, above, versions="all") == ["a:1", "d:1", "e:1", "e:2"]


async def test_an_alias_chooses_its_version_and_aliases_are_in_the_answer(client, vectors):
    await client.vectors.set_alias("c", "best", 1)
    await client.vectors.set_alias("d", "best", 1)

    assert await found(client, versions="alias:best") == ["c:1", "d:1"]
    assert [v.aliases async for v in client.vectors.search(versions="alias:best")] == [["best"], ["best"]]


async def test_what_was_deleted_is_not_found(client, vectors):
    await client.vectors.delete("c:2")
    await client.vectors.delete("d")

    assert (await found(client))[2:4] == ["c:1", "e:2"]
    assert "c:2" not in await found(client, versions="all")


async def test_figures_sort_in_both_directions_and_missing_ones_come_last(client, vectors):
    assert await found(client, sort=[BY_ACCURACY]) == ["h:1", "g:1", "b:1", "a:1", "d:1", "e:2", "c:2", "f:1"]
    assert await found(client, sort=[f"-{BY_ACCURACY}", "-name"]) == [
        *("e:2", "d:1", "a:1", "b:1", "g:1", "h:1", "f:1", "c:2")
    ]  # fmt: skip


async def test_of_several_figures_the_last_measured_one_counts(client, vectors, start):
    await client.vectors.register("b", prompt=prompt_near(start, 10), initialization="family", metrics=[figure(3.0)])

    assert (await found(client, sort=[f"-{BY_ACCURACY}"]))[:2] == ["b:1", "e:2"]


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize(
    "sort", [[], ["-name"], ["created_at"], ["-norm"], [BY_ACCURACY], [f"-{BY_ACCURACY}", "norm"], ["norm", "-name"]]
)
async def test_pages_are_the_whole_in_pieces(client, vectors, sort, size):
    whole = await found(client, versions="all", sort=sort)

    assert len(whole) == 10
    assert await found(client, versions="all", sort=sort, page_size=size) == whole


async def test_what_is_registered_meanwhile_moves_nothing_from_page_to_page(client, vectors, start):
    seen = []
    async for version in client.vectors.search(sort=[f"-{BY_ACCURACY}"], page_size=2):
        seen.append(version.reference.removeprefix("default/"))
        metrics = [figure(5.0 + len(seen))]  # each of them would be the first
        await client.vectors.register(
            f"new-{len(seen)}", prompt=prompt_near(start, 100 + len(seen)), initialization="family", metrics=metrics
        )

    assert seen == ["e:2", "a:1", "d:1", "b:1", "g:1", "h:1", "c:2", "f:1"]


async def test_a_sort_key_is_read_from_text():
    key = MetricKey(dataset="default/cr:1", split="test", metric="accuracy")

    assert SortKey.parse(f"-{BY_ACCURACY}") == SortKey(by=key, descending=True)
    assert SortKey.parse("norm") == SortKey(by="norm")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"filter": {"nmae": "a"}}, "filter.nmae"),
        ({"filter": {"not": {"not": {"alias": "latest"}}}}, "reads like a version"),
        ({"filter": {"any": [{}] * 101}}, "at most 100"),
        ({"versions": "oldest"}, "versions"),
        ({"sort": [{"by": "size"}]}, "sort.0.by"),
        ({"cursor": "WyJ4Il0="}, "cursor"),
        ({"cursor": "WyJ4IiwieCIsIngiXQ=="}, "cannot be stored"),
        ({"limit": 0}, "limit"),
        ({"filter": {"task": "a\u0000"}}, "cannot be stored"),
    ],
)  # fmt: skip
async def test_a_bad_search_is_a_422_that_says_where(http: httpx.AsyncClient, vectors, body, said):
    answer = await http.post("/api/v1/vectors/search", json=body)

    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
    assert said in answer.json()["detail"]


async def test_a_filter_too_deep_for_the_reader_is_a_client_error(http: httpx.AsyncClient, vectors):
    body = '{"filter":' + '{"not":' * 50_000 + "{}" + "}" * 50_000 + "}"
    answer = await http.post("/api/v1/vectors/search", content=body, headers={"Content-Type": "application/json"})

    assert 400 <= answer.status_code < 500


async def test_the_client_refuses_what_cannot_be_asked(client, vectors):
    with pytest.raises(errors.Invalid, match="DATASET/SPLIT/METRIC"):
        await found(client, sort=["size"])
    with pytest.raises(errors.Invalid, match="nmae"):
        await found(client, {"nmae": "a"})
