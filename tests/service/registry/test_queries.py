"""Many references resolved at once mean what each of them means alone."""

from __future__ import annotations

import pytest
from fastapi import FastAPI
from tests.service.registry.conftest import prompt_near

from tpv import errors
from tpv_service.registry import queries

pytestmark = pytest.mark.anyio


@pytest.fixture
async def session(app: FastAPI):
    async with app.state["sessions"]() as session:
        yield session


@pytest.fixture
async def registered(client, family, start) -> list[str]:
    """References of every kind: names, numbers, aliases, ids; versions and vectors that were deleted beside them."""
    made = []
    for seed, name in enumerate(("mnli", "mnli", "mnli", "team/mnli", "qnli", "gone")):
        prompt = prompt_near(start, seed)
        made.append(await client.vectors.register(name, prompt=prompt, initialization="family"))
    await client.vectors.set_alias("mnli", "best", 1)
    await client.vectors.delete("mnli:3")
    await client.vectors.delete("gone")
    return ["qnli", "mnli", "mnli:1", "mnli@best", "team/mnli", "default/mnli:2", str(made[3].id), "qnli"]


async def test_many_references_mean_what_each_means_alone(session, registered):
    alone = [(await queries.resolve_version(session, reference)).id for reference in registered]

    assert [row.id for row in await queries.resolve_versions(session, registered)] == alone


async def test_no_references_are_no_versions(session, registered):
    assert await queries.resolve_versions(session, []) == []


async def test_all_that_is_missing_is_named_in_one_error(session, registered):
    with pytest.raises(errors.NotFound) as caught:
        await queries.resolve_versions(session, ["mnli:3", "qnli", "gone", "mnli@worst", "nothing", "mnli:9"])

    assert caught.value.extra["references"] == ["mnli:3", "gone", "mnli@worst", "nothing", "mnli:9"]
    for reference in caught.value.extra["references"]:
        assert reference in str(caught.value)


async def test_a_fingerprint_names_no_vector(session, registered):
    with pytest.raises(errors.InvalidReference, match="by name or id"):
        await queries.resolve_versions(session, ["qnli", "sha256:" + "0" * 64])
