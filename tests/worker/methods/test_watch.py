from __future__ import annotations

from typing import Any

import pytest

from tpv_worker.methods.watch import COLLAPSED, FLAPPING, WINDOW, Watch


def watched(groups: list[tuple[int, ...]], *, largest: int = 3) -> tuple[Watch, list[dict[str, Any]]]:
    """A run of these groups, one a step; and what it has warned of."""
    watch, events = Watch(len(groups), ["mnli", "qnli", "sst2"], largest), []
    watch.report = events.append
    for members in groups:
        watch.saw(members)
    return watch, events


def test_it_counts_changes_of_who_is_in_the_group_whatever_the_order() -> None:
    watch, events = watched([(0, 1)] * 10 + [(1, 0)] * 10 + [(0, 1, 2)] * 10 + [(2,)] * 10)
    assert watch.facts["group_changes_per_100_steps"] == 2 * 100 / 40
    assert watch.facts["group_jaccard"] == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert not events


def test_a_group_that_does_not_settle_is_told_once() -> None:
    flapping = [(0, 1), (0, 2)] * 200
    watch, [warning] = watched(flapping)
    assert warning["type"] == "warning"
    assert "does not settle" in warning["message"]
    assert warning["step"] == 201, "the first half of a run may change as it likes"
    assert watch.facts["warnings"] == [warning["message"]]
    assert watch.facts["group_jaccard"] == pytest.approx(1 / 3)


def test_changes_that_become_rare_are_usual() -> None:
    """Section 4.4 of the DTVG paper: many changes in the early stages."""
    settled = [(0, 1), (0, 2)] * 100 + [(0, 1)] * (WINDOW // FLAPPING + 1) + [(0, 2)] * 400
    assert watched(settled)[1] == []


@pytest.mark.parametrize(
    ("group", "message"), [((), "empty for 100 steps"), ((2,), "sst2 alone for 100 steps")], ids=["empty", "single"]
)
def test_a_group_that_stays_empty_or_single_is_told_once(group: tuple[int, ...], message: str) -> None:
    _, [warning] = watched([(0, 1)] * 50 + [group] * 300 + [(0, 1)] * 50 + [group] * 300)
    assert message in warning["message"]
    assert warning["step"] == 50 + WINDOW
    assert watched([group] * 99 + [(0, 1)] * 99 + [group] * 99)[1] == []


def test_a_short_run_is_judged_by_its_half() -> None:
    _, [warning] = watched([()] * 40)
    assert warning["step"] == 20


def test_nothing_is_said_of_what_was_asked_for() -> None:
    """One source in all, or at most; no sources at all."""
    assert watched([(0,)] * 300, largest=1)[1] == []
    assert watched([()] * 300, largest=0)[1] == []


def test_scaling_terms_that_collapse_are_told_once_each() -> None:
    watch, events = watched([])
    watch.sizes([("the target", 1.0), ("mnli", COLLAPSED)])
    assert not events
    watch.sizes([("the target", 0.001), ("mnli", 0.05)])
    watch.sizes([("the target", 0.001), ("mnli", 0.04), ("qnli", 0.03)])
    first, second = (event["message"] for event in events)
    assert "the target (0.001), mnli (0.05)" in first
    assert "hardly count: qnli (0.03);" in second
