from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from tests.worker.methods.conftest import OPTIONS, count, fit
from torch import Tensor

from tpv.methods import PromptTuningOptions, SpotMultitaskOptions, SpotOptions
from tpv_worker.backbone import Backbone, Prompt
from tpv_worker.data import Example, Task
from tpv_worker.methods import Given, PromptTuning, Spot, SpotMultitask

FEW = {**OPTIONS, "steps": 10}


@pytest.fixture
def by_hand(given: Given) -> Given:
    """d = 2, r = 2; pooled: P_init (1, 0), the target (0, 1), the sources `flat` (0, 3) and `long` (9, 9)."""

    def rows(*values: tuple[float, float]) -> Tensor:
        return torch.tensor(values)

    return replace(
        given,
        initialization=rows((2.0, 1.0), (0.0, -1.0)),
        target=rows((-1.0, 0.0), (1.0, 2.0)),
        sources=torch.stack([rows((0.0, 6.0), (0.0, 0.0)), rows((18.0, 0.0), (0.0, 18.0))]),
        source_names=["flat", "long"],
    )


@pytest.mark.parametrize(
    ("metric", "similarities"),
    [
        # cos of (1, 1) with (1, 3) and (10, 9)
        ("cosine-prompt", [4 / (2 * 10) ** 0.5, 19 / (2 * 181) ** 0.5]),
        ("cosine", [1.0, 0.5**0.5]),
        ("cosine-flat", [0.0, (-18 + 36) / (6 * 2 * 18**2) ** 0.5]),
        ("dot", [3.0, 9.0]),
    ],
)
def test_it_starts_from_the_prompt_of_the_most_similar_source(
    by_hand: Given, metric: str, similarities: list[float]
) -> None:
    method = Spot(SpotOptions(metric=metric), by_hand)
    best = similarities.index(max(similarities))
    assert by_hand.sources is not None
    assert torch.equal(method.prompt(), by_hand.initialization + by_hand.sources[best])
    assert method.facts["source"] == ["flat", "long"][best]
    assert method.facts["similarity"] == pytest.approx(similarities[best], rel=1e-6)
    assert [*method.facts["similarities"].values()] == pytest.approx(similarities, rel=1e-6, abs=1e-7)


def test_of_equal_sources_the_first_one_is_taken(by_hand: Given) -> None:
    assert by_hand.sources is not None
    twice = replace(by_hand, sources=by_hand.sources[[1, 1]], source_names=["first", "second"])
    assert Spot(SpotOptions(), twice).facts["source"] == "first"


def test_it_trains_as_many_parameters_as_prompt_tuning(given: Given) -> None:
    """r = 100, d = 768: 76.8 k (Table 2 of the DTVG paper)."""
    wide = torch.zeros(100, 768)
    wide_given = replace(given, initialization=wide, target=wide, sources=wide[None])
    assert count(Spot(SpotOptions(), wide_given)) == 76_800
    assert count(SpotMultitask(SpotMultitaskOptions(), wide_given)) == 76_800
    assert count(PromptTuning(PromptTuningOptions(), wide_given)) == 76_800


def test_it_is_prompt_tuning_from_another_start(given: Given, task: Task) -> None:
    assert given.sources is not None
    transferred = replace(given, target=given.sources[1], source_names=[*"abc"])
    spot, _ = fit(Spot(SpotOptions(**FEW, metric="cosine"), transferred), given, task)
    elsewhere = replace(given, initialization=given.initialization + given.sources[1])
    plain, _ = fit(PromptTuning(PromptTuningOptions(**FEW), elsewhere), given, task)
    assert torch.equal(spot.snapshot.prompt, plain.snapshot.prompt)


def test_multitask_spot_is_one_prompt_for_the_mixed_rows(given: Given, task: Task) -> None:
    """One task: prompt tuning. Of 24 and 8 rows, with the limit 16, there are two of the one to each other."""
    alone, _ = fit(SpotMultitask(SpotMultitaskOptions(**FEW), given), given, task)
    plain, _ = fit(PromptTuning(PromptTuningOptions(**FEW), given), given, task)
    assert torch.equal(alone.snapshot.prompt, plain.snapshot.prompt)

    seen: Counter[int] = Counter()

    class Counting(SpotMultitask):
        def loss(self, backbone: Backbone, prompt: Prompt, batch: Sequence[Example]) -> Tensor:
            seen.update(example.task for example in batch)
            return super().loss(backbone, prompt, batch)

    options = SpotMultitaskOptions(**{**FEW, "steps": 9}, mixing_limit=16)
    fit(Counting(options, replace(given, tasks=2)), given, task, replace(task, train=task.train[:8]))
    assert seen == {0: 9 * 8 * 2 / 3, 1: 9 * 8 / 3}
