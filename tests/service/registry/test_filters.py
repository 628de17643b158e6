"""What a filter lets pass, against the same filter evaluated in Python on what the client shows."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from random import Random
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from tests.service.registry.conftest import ROWS, WIDTH, prompt_near

import tpv
from tpv.references import Reference
from tpv.schemas.filters import Filter
from tpv.schemas.vectors import Vector, Version
from tpv_service.registry.filters import condition
from tpv_service.registry.tables import InitializationRow, VersionRow

pytestmark = pytest.mark.anyio


@dataclass
class Registered:
    version: Version
    vector: Vector


@pytest.fixture
async def registry(client: tpv.AsyncClient, family, start) -> list[Registered]:
    """Nine versions of six vectors of two initializations, as different as a filter can tell."""
    other = np.zeros((ROWS, WIDTH), np.float32)
    await client.initializations.create("other", base_model="tiny-llama", revision="b" * 40, tensor=other)

    def figure(value: float, **members: Any) -> dict[str, Any]:
        return {"dataset": "default/cr:1", "split": "test", "metric": "accuracy", "value": value, **members}

    made = [
        await client.vectors.register(
            name, prompt=prompt_near(start, seed), initialization="other" if seed in (4, 7) else "family", **members
        )
        for seed, (name, members) in enumerate(
            [
                ("a", {"task": "t1", "task_type": "nli", "tags": {"team": "x"}, "method": "prompt-tuning"}),
                ("a", {"metrics": [figure(0.5)], "method": "dtvg"}),
                ("b", {"task": ["t1", "t2"], "tags": {"team": "x", "seed": "1"}, "metrics": [figure(0.5, seed=3)]}),
                ("b", {"metrics": [figure(0.75), figure(0.25, split="validation")]}),
                ("b", {"method": "dtvg"}),
                ("ns/a", {"task_type": "nli", "tags": {"team": "y"}, "metrics": [figure(0.9, metric="f1")]}),
                ("ns/c", {"task": "t2", "metrics": [figure(0.75, dataset="catalog:glue/rte")]}),
                ("d", {"method": "dtvg"}),
                ("e", {}),
            ]
        )
    ]
    await client.vectors.set_alias("a", "best", 1)
    await client.vectors.set_alias("b", "best", 3)
    await client.vectors.set_alias("b", "first", 1)
    return [
        Registered(
            await client.vectors.get(version), await client.vectors.describe(f"{version.namespace}/{version.name}")
        )
        for version in made
    ]


def passes(asked: Filter, it: Registered) -> bool:
    """The meaning of a filter, literally."""
    version, vector = it.version, it.vector
    held = [
        asked.names is None or f"{vector.namespace}/{vector.name}" in asked.names,
        asked.namespace in (None, vector.namespace),
        asked.task is None or asked.task in vector.tasks,
        asked.task_type in (None, vector.task_type),
        asked.base_model in (None, version.initialization.base_model),
        asked.initialization is None or is_initialization(asked.initialization, version),
        all(vector.tags.get(key) == value for key, value in (asked.tags or {}).items()),
        asked.alias is None or asked.alias in version.aliases,
        asked.method in (None, version.method),
        asked.created_after is None or version.created_at >= asked.created_after,
        asked.created_before is None or version.created_at < asked.created_before,
        asked.all is None or all(passes(inner, it) for inner in asked.all),
        asked.any is None or any(passes(inner, it) for inner in asked.any),
        asked.not_ is None or not passes(asked.not_, it),
        all(
            any(
                evaluation.metric == wanted.metric
                and wanted.dataset in (None, evaluation.dataset)
                and wanted.split in (None, evaluation.split)
                and (wanted.at_least is None or evaluation.value >= wanted.at_least)
                and (wanted.at_most is None or evaluation.value <= wanted.at_most)
                for evaluation in version.evaluations
            )
            for wanted in asked.metrics or ()
        ),
    ]
    return all(held)


def is_initialization(text: str, version: Version) -> bool:
    reference, found = Reference.parse(text), version.initialization
    return (
        reference.id == found.id
        or reference.fingerprint == found.fingerprint
        or (reference.namespace, reference.name) == (found.namespace, found.name)
    )


def leaves(registry: list[Registered]) -> dict[str, list[Any]]:
    """For each leaf condition values that some, none or all of the versions meet."""
    first, last = registry[0].version, registry[-1].version
    middle = registry[4].version.created_at
    times: list[datetime] = [first.created_at, middle, last.created_at, last.created_at + timedelta(days=1)]
    return {
        "names": [[], ["a"], ["ns/a", "b"], ["nothing"]],
        "namespace": ["default", "ns", "nothing"],
        "task": ["t1", "t2", "nothing"],
        "task_type": ["nli", "nothing"],
        "base_model": ["tiny-t5", "tiny-llama", "nothing"],
        "initialization": ["family", "ns/family", str(registry[4].version.initialization.id),
                           first.initialization.fingerprint],
        "tags": [{}, {"team": "x"}, {"team": "x", "seed": "1"}, {"team": "z"}],
        "alias": ["best", "first", "nothing"],
        "method": ["dtvg", "prompt-tuning", "nothing"],
        "metrics": [
            [], [{"metric": "accuracy"}], [{"metric": "accuracy", "at_least": 0.5, "at_most": 0.5}],
            [{"metric": "accuracy", "split": "test", "at_least": 0.6}], [{"metric": "f1", "at_most": 0.5}],
            [{"metric": "accuracy", "dataset": "catalog:glue/rte"}],
            [{"metric": "accuracy", "at_most": 0.3}, {"metric": "accuracy", "at_least": 0.7}],
        ],
        "created_after": times,
        "created_before": times,
    }  # fmt: skip


@pytest.fixture
async def session(app: FastAPI) -> AsyncIterator[AsyncSession]:
    async with app.state["sessions"]() as session:  # type: ignore[attr-defined]
        yield session


async def ids(session: AsyncSession, asked: Filter) -> set[Any]:
    return set(await session.scalars(select(VersionRow.id).join(VersionRow.vector).where(condition(asked))))


async def test_each_leaf_means_what_it_says_and_not_is_its_complement(session, registry):
    everything = {it.version.id for it in registry}
    told_apart = set()
    for leaf, values in leaves(registry).items():
        for value in values:
            asked = Filter.model_validate({leaf: value})
            expected = {it.version.id for it in registry if passes(asked, it)}

            assert await ids(session, asked) == expected, (leaf, value)
            assert await ids(session, Filter(not_=asked)) == everything - expected, (leaf, value)
            if 0 < len(expected) < len(everything):
                told_apart.add(leaf)
    assert told_apart == set(leaves(registry)) == set(Filter.model_fields) - {"all", "any", "not_"}


async def test_every_tree_means_what_it_says(session, registry):
    known, random = leaves(registry), Random(0)

    def tree(depth: int) -> dict[str, Any]:
        found = {leaf: random.choice(known[leaf]) for leaf in random.sample(list(known), random.choice([0, 1, 1, 2]))}
        if depth and (connective := random.choice([None, "all", "any", "any", "not"])):
            inside = [tree(depth - 1) for _ in range(random.randint(0, 3))]
            found[connective] = tree(depth - 1) if connective == "not" else inside
        return found

    sizes = set()
    for _ in range(200):
        asked = Filter.model_validate(tree(3))
        expected = {it.version.id for it in registry if passes(asked, it)}
        sizes.add(len(expected))

        assert await ids(session, asked) == expected, asked.model_dump(exclude_unset=True)
    assert len(sizes) > 5  # most of the trees tell versions apart


async def test_a_statement_may_join_what_a_condition_looks_into(session, registry):
    asked = Filter.model_validate({"initialization": "other", "metrics": [], "base_model": "tiny-llama"})
    joined = (
        select(VersionRow.id)
        .join(VersionRow.vector)
        .join(VersionRow.initialization)
        .add_columns(InitializationRow.name)
    )
    found = (await session.execute(joined.where(condition(asked)))).all()

    assert {version for version, _ in found} == {
        it.version.id for it in registry if it.version.initialization.name == "other"
    }


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"nmae": "a"}, "not permitted"),
        ({"names": ["a:3"]}, "without version or alias"),
        ({"alias": "latest"}, "reads like a version"),
        ({"initialization": "family@best"}, "no versions"),
        ({"created_after": "2026-01-01T00:00:00"}, "timezone"),
        ({"metrics": [{"metric": "accuracy", "at_least": float("nan")}]}, "finite"),
        ({"any": [{}] * 100}, "at most 100 on 8"),
        ({"all": [{"any": [{"not": {"all": [{"any": [{"not": {"all": [{"any": [{}]}]}}]}]}}]}]}, "at most 100 on 8"),
    ],
)  # fmt: skip
def test_what_is_no_filter_is_refused(asked, said):
    with pytest.raises(ValueError, match=said):
        Filter.model_validate(asked)


def test_a_filter_is_written_as_it_is_read():
    asked = {"task": "t", "any": [{"not": {"alias": "best"}}, {}], "metrics": [{"metric": "f1", "at_least": 0.5}]}

    assert Filter.model_validate(asked).model_dump(mode="json", exclude_unset=True) == asked
    assert Filter(not_=Filter(task="t")).model_dump(mode="json", exclude_unset=True) == {"not": {"task": "t"}}
