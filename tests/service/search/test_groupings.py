"""What a request for groups may say, and what its answer shows beside the group."""

from __future__ import annotations

import pytest
from tests.service.search.conftest import SOURCES

from tpv import errors

pytestmark = pytest.mark.anyio


async def test_an_answer_has_an_end(client, vectors, monkeypatch):
    monkeypatch.setattr("tpv_service.search.endpoints.ANSWER_LIMIT", 30)
    assert len((await client.groupings.create("rte", strategy="all")).members) == SOURCES
    with pytest.raises(errors.Invalid, match="more than 30 members and decisions; give max_size"):
        await client.groupings.create_many(["rte", "s00"], strategy="all")
    assert len(await client.groupings.create_many(["rte", "s00"], strategy="all", max_size=1, task_type="odd")) == 2


async def test_several_targets_are_grouped_at_once(client, vectors):
    one, other = await client.groupings.create_many(["rte", "s00"], strategy="top-k", max_size=2, task_type="odd")

    assert (one.target, other.target) == ("default/rte:1", "default/s00:1")
    assert one == await client.groupings.create("rte", strategy="top-k", max_size=2, task_type="odd")


async def test_the_strategies_are_shown_side_by_side(client, vectors):
    answer = await client.groupings.create("rte", compare=True, max_size=3)
    shown = {result.strategy: result for result in answer.comparison}

    assert shown["greedy"].members == [member.reference for member in answer.members]
    assert shown["exact"].objective >= max(result.objective for result in answer.comparison) - 1e-5
    assert all(result.size <= 3 for result in answer.comparison)


@pytest.mark.parametrize("strategy", ["exact", "greedy"])
async def test_one_trade_off_weighs_in_all_that_is_compared(client, vectors, strategy):
    answer = await client.groupings.create("rte", strategy=strategy, compare=True, max_size=4, trade_off=0.1)
    shown = {result.strategy: result for result in answer.comparison}

    assert (answer.trade_off, answer.max_size, answer.min_similarity) == (0.1, 4, None)
    for result in (answer, *answer.comparison):
        assert result.objective == pytest.approx(result.target_similarity + 0.1 * result.knowledge_consistency)
    assert shown[strategy].objective == answer.objective
    assert shown["exact"].objective >= max(result.objective for result in answer.comparison) - 1e-5


async def test_a_strategy_that_refuses_has_no_figures(client, vectors, monkeypatch):
    monkeypatch.setattr("tpv._strategies.EXACT_LIMIT", 2)
    refused = {result.strategy: result for result in (await client.groupings.create("rte", compare=True)).comparison}

    assert "at most 2" in refused["exact"].refused
    assert (refused["exact"].objective, refused["greedy"].refused) == (None, None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"strategy": "greedy", "trade_off": 2.0}, "trade_off matters to the strategy exact alone"),
        ({"strategy": "top-k"}, "top-k needs max_size"),
        ({"strategy": "best"}, "strategy"),
        ({"max_size": -1}, "max_size"),
    ],
)
async def test_options_that_make_no_sense_are_refused(client, vectors, options, said):
    with pytest.raises(errors.Invalid, match=said):
        await client.groupings.create("rte", **options)


async def test_a_long_trace_is_cut_unless_all_is_asked_for(client, vectors, monkeypatch):
    monkeypatch.setattr("tpv_service.search.endpoints.LISTED", 2)
    cut = await client.groupings.create("rte", min_similarity=-100, strategy="all")
    whole = await client.groupings.create("rte", min_similarity=-100, strategy="all", trace="all")
    greedy = await client.groupings.create("rte")

    assert (cut.trace_total, whole.trace_total, len(whole.trace)) == (SOURCES, SOURCES, SOURCES)
    assert {member.reference for member in greedy.members} <= {t.reference for t in greedy.trace}
    assert len(greedy.trace) < SOURCES
