"""Vectors of several initializations: refused, and with the flag compared, which the answer says."""

from __future__ import annotations

import numpy as np
import pytest
from tests.service.search.conftest import ROWS, WIDTH

from tpv import errors
from tpv.schemas.filters import Filter
from tpv.similarity import similarity

pytestmark = pytest.mark.anyio


@pytest.fixture
async def stranger(client, vectors, start) -> np.ndarray:
    await client.initializations.create("other", base_model="tiny-t5", revision="a" * 40, tensor=start + 1)
    await client.vectors.register("stranger", vector=vectors["s00"], initialization="other", task="z")
    return vectors["s00"]


async def test_they_are_refused_and_both_and_the_flag_are_named(client, vectors, stranger):
    said = r"family.*other.*allow_mixed_initializations"
    for call in (
        client.similarity.search("rte", candidates=["s01", "stranger"]),
        client.similarity.search({"rte": 1, "stranger": 1}),
        client.similarity.matrix(["rte", "stranger"]),
        client.groupings.create("rte", ["s01", "stranger"]),
    ):
        with pytest.raises(errors.IncompatibleVectors, match=said):
            await call


async def test_with_the_flag_they_are_compared_and_the_answer_says_so(client, http, vectors, stranger):
    asked = {"allow_mixed_initializations": True}
    found = await client.similarity.search("rte", candidates=["s01", "stranger"], **asked)
    values = {hit.reference: hit.similarity for hit in found.hits}
    group = await client.groupings.create("rte", ["s01", "stranger"], **asked)
    matrix = await client.similarity.matrix(["rte", "stranger"], **asked)

    assert values["default/stranger:1"] == pytest.approx(float(similarity(vectors["rte"], stranger)), rel=1e-5)
    for said in (found.pool, group.pool, matrix):
        assert [summary.name for summary in said.mixed_initializations] == ["other"]
    table = await http.post("/api/v1/similarity/matrix?format=csv", json={"references": ["rte", "stranger"], **asked})
    assert table.text.startswith('"dot, exact, default/family and default/other"')


async def test_soft_prompts_are_compared_with_the_initialization_of_each(client, vectors, start, stranger):
    asked = {"metric": "cosine-prompt", "allow_mixed_initializations": True}
    found = await client.similarity.search("rte", candidates=["s01", "stranger"], **asked)
    matrix = await client.similarity.matrix(["rte", "stranger"], **asked)
    value = float(similarity(vectors["rte"] + start, stranger + start + 1, "cosine"))

    assert {h.reference: h.similarity for h in found.hits}["default/stranger:1"] == pytest.approx(value, rel=1e-5)
    assert matrix.matrix[0][1] == pytest.approx(value, rel=1e-5)


async def test_a_filter_for_another_initialization_is_refused(client, vectors, stranger):
    said = r"family.*other.*allow_mixed_initializations"
    with pytest.raises(errors.IncompatibleVectors, match=said):
        await client.similarity.search("rte", initialization="other")
    with pytest.raises(errors.IncompatibleVectors, match=said):
        await client.groupings.create("rte", Filter(all=[Filter(initialization="other"), Filter(task="z")]))
    assert (await client.similarity.search("rte", initialization="family", k=1)).hits


async def test_the_flag_is_for_vectors_that_are_named(client, vectors, stranger):
    for call in (
        client.similarity.search("rte", allow_mixed_initializations=True),
        client.groupings.create("rte", task="z", allow_mixed_initializations=True),
    ):
        with pytest.raises(errors.Invalid, match=r"named in candidates\.references"):
            await call
    mixed = await client.similarity.search({"rte": 1, "stranger": 1}, allow_mixed_initializations=True)
    assert [summary.name for summary in mixed.pool.mixed_initializations] == ["other"]


async def test_the_mean_of_one_is_not_subtracted_from_another(client, vectors, stranger):
    asked = {"metric": "cosine-centered", "allow_mixed_initializations": True}
    for call in (
        client.similarity.search("rte", candidates=["s01", "stranger"], **asked),
        client.similarity.matrix(["rte", "stranger"], **asked),
    ):
        with pytest.raises(errors.Invalid, match=r"default/family, which means nothing to those of default/other"):
            await call


async def test_not_even_the_flag_compares_other_shapes_or_models(client, vectors):
    await client.initializations.create(
        "wide", base_model="tiny-t5", unpinned=True, tensor=np.ones((ROWS + 1, WIDTH), np.float32)
    )
    await client.vectors.register("wide", vector=np.ones((ROWS + 1, WIDTH), np.float32), initialization="wide")
    with pytest.raises(errors.IncompatibleVectors, match="num_virtual_tokens"):
        await client.similarity.matrix(["rte", "wide"], allow_mixed_initializations=True)
