"""The lineage of a version, through the published client."""

from __future__ import annotations

import pytest
from tests.service.registry.conftest import prompt_near

import tpv
from tpv import errors
from tpv_service.registry import lineage

pytestmark = pytest.mark.anyio


@pytest.fixture
async def graph(client: tpv.AsyncClient, family, start) -> None:
    """A diamond with a tail, and what is not related: a -> b, c -> d -> e; x -> d; x -> y."""
    parents = {"a": "", "x": "", "b": "a", "c": "a", "d": "bcx", "e": "d", "y": "x"}
    for seed, (name, made_from) in enumerate(parents.items()):
        await client.vectors.register(
            name,
            prompt=prompt_near(start, seed),
            initialization="family",
            method="prompt-tuning",
            parents=[{"reference": parent, "role": "source", "weight": 0.5} for parent in made_from],
        )


def short(found: tpv.schemas.lineage.Lineage) -> tuple[set[str], set[str]]:
    """Names of the nodes, and edges as parent and child."""
    return (
        {node.reference.removeprefix("default/").removesuffix(":1") for node in found.nodes},
        {edge.parent[8] + edge.child[8] for edge in found.edges},
    )


@pytest.mark.parametrize(
    ("name", "nodes", "edges"),
    [
        ("a", "abcde", {"ab", "ac", "bd", "cd", "de"}),
        ("b", "abde", {"ab", "bd", "de"}),
        ("d", "abcdex", {"ab", "ac", "bd", "cd", "xd", "de"}),
        ("e", "abcdex", {"ab", "ac", "bd", "cd", "xd", "de"}),
        ("x", "xdey", {"xd", "de", "xy"}),
        ("y", "xy", {"xy"}),
    ],
)
async def test_ancestors_and_descendants_of_a_version_are_found_over_any_number_of_steps(
    client, graph, name, nodes, edges
):
    found = await client.vectors.lineage(name)

    assert found.reference == f"default/{name}:1"
    assert short(found) == (set(nodes), edges)
    assert not found.truncated


async def test_nodes_and_edges_say_what_they_are(client, graph, family, start):
    await client.vectors.delete("e:1")
    await client.vectors.delete("y")
    found = await client.vectors.lineage("x")

    assert {node.reference for node in found.nodes if node.deleted} == {"default/e:1", "default/y:1"}
    assert {(node.method, node.job) for node in found.nodes} == {("prompt-tuning", None)}
    assert {(edge.role, edge.weight) for edge in found.edges} == {("source", 0.5)}
    assert [node.fingerprint for node in found.nodes if node.reference == "default/d:1"] == [
        (await client.vectors.get("d")).fingerprint
    ]


async def test_parents_stand_before_their_children(client, graph):
    found = await client.vectors.lineage("d")
    place = {node.reference: i for i, node in enumerate(found.nodes)}

    assert all(place[edge.parent] < place[edge.child] for edge in found.edges)


async def test_a_version_without_lineage_stands_alone_and_a_missing_one_is_not_found(client, family, start):
    await client.vectors.register("alone", prompt=prompt_near(start, 1), initialization="family")
    found = await client.vectors.lineage("alone")

    assert short(found) == ({"alone"}, set())
    with pytest.raises(errors.NotFound):
        await client.vectors.lineage("alone:2")


async def test_a_long_chain_is_found_whole_and_a_longer_one_than_the_limit_is_cut_at_the_far_end(
    client, family, start, monkeypatch
):
    names = [f"v{i:02}" for i in range(40)]
    for seed, (name, parent) in enumerate(zip(names, [None, *names], strict=False)):
        await client.vectors.register(
            name,
            prompt=prompt_near(start, seed),
            initialization="family",
            parents=[{"reference": parent}] if parent else None,
        )
    whole = await client.vectors.lineage(names[20])
    monkeypatch.setattr(lineage, "MAX_NODES", 11)
    cut = await client.vectors.lineage(names[20])

    assert (len(whole.nodes), len(whole.edges), whole.truncated) == (40, 39, False)
    assert cut.truncated
    assert [node.reference for node in cut.nodes] == [f"default/{name}:1" for name in names[10:31]]
