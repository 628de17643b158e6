"""Similarity and grouping queries, against the mathematics of `tpv` on the same vectors."""

from __future__ import annotations

import numpy as np
import pytest

import tpv
from tpv import errors, grouping, similarity

pytestmark = pytest.mark.anyio

ROWS, WIDTH = 4, 6


@pytest.fixture
async def vectors(client: tpv.AsyncClient) -> dict[str, np.ndarray]:
    """A target `rte` and six sources `s0` ... `s5` of one family."""
    random = np.random.default_rng(3)
    start = random.normal(size=(ROWS, WIDTH)).astype(np.float32)
    await client.initializations.create("family", base_model="tiny-t5", revision="a" * 40, tensor=start)
    common = random.normal(size=WIDTH)
    made = {}
    for name in ["rte", *(f"s{i}" for i in range(6))]:
        made[name] = (random.normal(size=(ROWS, WIDTH)) + 0.7 * common).astype(np.float32)
        await client.vectors.register(name, vector=made[name], initialization="family", task=f"task-{name}")
    return made


async def test_search_ranks_by_the_product_of_pooled_vectors(client, vectors):
    answer = await client.similarity.search("rte", k=3)
    expected = {n: float(similarity.similarity(vectors["rte"], v)) for n, v in vectors.items() if n != "rte"}
    best = sorted(expected, key=expected.__getitem__, reverse=True)[:3]

    assert [hit.reference for hit in answer.hits] == [f"default/{name}:1" for name in best]
    np.testing.assert_allclose([hit.similarity for hit in answer.hits], [expected[n] for n in best], rtol=1e-5)
    assert answer.pool.size == 6
    assert answer.pool.exact
    assert (answer.pool.excluded, answer.pool.excluded_total) == ({"default/rte:1": "the target itself"}, 1)


async def test_the_pool_leaves_out_the_targets_own_task_and_what_was_made_from_it(client, vectors):
    tensor = vectors["rte"] + 1
    await client.vectors.register("rte-2", vector=tensor, initialization="family", task="task-rte")
    await client.vectors.register("both", vector=tensor + 3, initialization="family", task=["z", "task-rte"])
    await client.vectors.register(
        "child", vector=tensor + 1, initialization="family", task="x", parents=[{"reference": "rte"}]
    )
    await client.vectors.register(
        "grandchild", vector=tensor + 2, initialization="family", task="y", parents=[{"reference": "child"}]
    )
    strict = await client.similarity.search("rte", k=100)
    loose = await client.similarity.search("rte", k=100, allow_same_task=True)
    named = await client.groupings.create(target="rte", candidates=["both", "s0", "child"])

    assert strict.pool.excluded == {
        "default/rte:1": "the target itself",
        "default/rte-2:1": "the target's own task",
        "default/both:1": "the target's own task",
        "default/child:1": "made from the target",
        "default/grandchild:1": "made from the target",
    }
    assert {hit.reference for hit in loose.hits} > {"default/rte-2:1", "default/both:1", "default/child:1"}
    assert named.pool.excluded == {"default/both:1": "the target's own task", "default/child:1": "made from the target"}


async def test_only_the_newest_not_deleted_version_is_in_the_pool(client, vectors):
    await client.vectors.register("s0", vector=vectors["s0"] * 2, initialization="family")
    await client.vectors.delete("s1")
    references = {hit.reference for hit in (await client.similarity.search("rte", k=100)).hits}

    assert "default/s0:2" in references
    assert not references & {"default/s0:1", "default/s1:1"}


async def test_the_matrix_compares_every_pair(client, vectors):
    names = list(vectors)
    answer = await client.similarity.matrix(names)
    stacked = np.stack([vectors[name] for name in names])

    np.testing.assert_allclose(answer.matrix, similarity.similarity(stacked, stacked), rtol=1e-5, atol=1e-6)
    assert answer.references == [f"default/{name}:1" for name in names]


async def test_a_grouping_is_what_the_mathematics_gives_with_every_decision(client, vectors):
    names = [name for name in vectors if name != "rte"]
    answer = await client.groupings.create(target="rte", candidates=names)
    expected = grouping.group(
        similarity.pool(vectors["rte"]), similarity.pool(np.stack([vectors[name] for name in names]))
    )

    assert [member.reference for member in answer.members] == [f"default/{names[i]}:1" for i in expected.members]
    assert answer.objective == pytest.approx(expected.objective, rel=1e-5)
    assert [entry.reason for entry in answer.trace] == [decision.reason for decision in expected.trace]
    assert len(answer.trace) == 6


async def test_without_candidates_the_whole_family_is_grouped(client, vectors):
    answer = await client.groupings.create(target="rte", max_size=1)

    assert answer.pool.size == 6
    assert len(answer.members) == 1


async def test_vectors_of_another_initialization_are_refused_field_by_field(client, vectors):
    start = np.zeros((ROWS, WIDTH), dtype=np.float32)
    await client.initializations.create("other", base_model="tiny-t5", revision="a" * 40, tensor=start)
    await client.vectors.register("stranger", vector=start + 1, initialization="other", task="z")

    with pytest.raises(errors.IncompatibleVectors, match=r"family.*other") as caught:
        await client.groupings.create(target="rte", candidates=["s0", "stranger"])
    assert set(caught.value.extra["differences"]) == {"fingerprint"}
    with pytest.raises(errors.IncompatibleVectors):
        await client.similarity.matrix(["s0", "stranger"])
    assert "default/stranger:1" not in {hit.reference for hit in (await client.similarity.search("rte", k=99)).hits}


async def test_an_empty_pool_gives_an_empty_group(client, vectors):
    answer = await client.groupings.create(target="rte", candidates=["rte"])

    assert (answer.members, answer.objective) == ([], 0)
