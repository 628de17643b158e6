from __future__ import annotations

import pytest
from tests.service.registry.test_versions import register

from tpv import errors

pytestmark = pytest.mark.anyio


@pytest.fixture
async def two_versions(client, family, start):
    await register(client, start, 1)
    await register(client, start, 2)


async def test_an_alias_names_a_version_and_moves(client, two_versions):
    await client.vectors.set_alias("mnli", "best", 1)
    assert (await client.vectors.get("mnli@best")).version == 1
    await client.vectors.set_alias("mnli", "best", 2, expected_version=1, reason="better")

    assert (await client.vectors.get("mnli@best")).aliases == ["best"]
    history = await client.vectors.alias_history("mnli", "best")
    assert [(change.from_version, change.to_version, change.reason, change.actor) for change in history] == [
        (1, 2, "better", "local"),
        (None, 1, None, "local"),
    ]


async def test_moving_an_alias_that_has_moved_is_refused(client, two_versions):
    await client.vectors.set_alias("mnli", "best", 2)
    with pytest.raises(errors.AliasMoved, match="points to version 2"):
        await client.vectors.set_alias("mnli", "best", 1, expected_version=1)


async def test_an_aliased_version_is_not_deleted_unless_forced(client, two_versions):
    await client.vectors.set_alias("mnli", "best", 2)
    with pytest.raises(errors.InUse, match="alias @best"):
        await client.vectors.delete("mnli:2")
    await client.vectors.delete("mnli:2", force=True)

    with pytest.raises(errors.NotFound):
        await client.vectors.get("mnli@best")


async def test_a_removed_alias_leaves_its_history(client, two_versions):
    await client.vectors.set_alias("mnli", "best", 2)
    await client.vectors.delete_alias("mnli", "best")

    assert (await client.vectors.describe("mnli")).aliases == {}
    assert [change.to_version for change in await client.vectors.alias_history("mnli", "best")] == [None, 2]


@pytest.mark.parametrize("alias", ["latest", "v1", "7", "newest", "no spaces"])
async def test_words_that_mean_a_version_are_no_aliases(client, http, two_versions, alias):
    answer = await http.put(f"/api/v1/vectors/default/mnli/aliases/{alias}", json={"version": 1})

    assert answer.status_code == 422


async def test_an_alias_needs_a_version_that_is_there(client, two_versions):
    with pytest.raises(errors.NotFound):
        await client.vectors.set_alias("mnli", "best", 9)
