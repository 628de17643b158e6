from __future__ import annotations

import numpy as np
import pytest

from tpv import errors, files

pytestmark = pytest.mark.anyio


async def test_the_same_tensor_of_one_base_model_is_one_initialization(client, family, start):
    again = await client.initializations.create("family", base_model="tiny-t5", revision="a" * 40, tensor=start)

    assert again.id == family.id
    assert family.created
    assert not again.created
    assert family.fingerprint == files.fingerprint(start)


async def test_the_same_tensor_under_another_name_is_refused_with_the_known_name(client, family, start):
    with pytest.raises(errors.Conflict, match="default/family"):
        await client.initializations.create("other", base_model="tiny-t5", revision="a" * 40, tensor=start)


async def test_a_name_belongs_to_one_tensor_for_ever(client, family, start):
    with pytest.raises(errors.Conflict, match="permanent"):
        await client.initializations.create("family", base_model="tiny-t5", revision="a" * 40, tensor=start + 1)


async def test_a_base_model_without_a_commit_is_refused_unless_asked_for(client, start):
    with pytest.raises(errors.Invalid, match="unpinned"):
        await client.initializations.create("family", base_model="tiny-t5", tensor=start)
    made = await client.initializations.create("family", base_model="tiny-t5", unpinned=True, tensor=start)

    assert made.base_model.unpinned
    assert not made.base_model.verified


async def test_it_is_found_by_name_id_and_fingerprint_and_loads_unchanged(client, family, start):
    for reference in ("family", "default/family", str(family.id), family.fingerprint):
        assert (await client.initializations.get(reference)).id == family.id

    np.testing.assert_array_equal(await client.initializations.load("family"), start)


async def test_an_unknown_one_says_where_to_look(client):
    with pytest.raises(errors.NotFound, match="tpv init list"):
        await client.initializations.get("nothing")


async def test_the_list_goes_over_pages(client, start):
    names = [f"init-{i}" for i in range(5)]
    for i, name in enumerate(names):
        await client.initializations.create(name, base_model="tiny-t5", revision="a" * 40, tensor=start + i)

    assert [found.name async for found in client.initializations.list()] == names


async def test_base_models_are_listed(client, family):
    assert [model.name for model in await client.initializations.base_models()] == ["tiny-t5"]
