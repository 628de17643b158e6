from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.worker.methods.conftest import OPTIONS, count, fit

from tpv.methods import PromptTuningOptions, TpvSumOptions
from tpv_worker.data import Row, Task
from tpv_worker.errors import OptionsError
from tpv_worker.evaluation import evaluate
from tpv_worker.methods import Given, PromptTuning, TpvSum
from tpv_worker.training import train


def make(given: Given, **options: Any) -> TpvSum:
    return TpvSum(TpvSumOptions(**{**OPTIONS, "steps": 10, **options}), given)


def test_the_start_is_equations_3_and_4(given: Given) -> None:
    """Two vectors of one row, worked by hand."""
    P_init, sources = torch.tensor([[1.0, 2.0]]), torch.tensor([[[2.0, -2.0]], [[4.0, 6.0]]])
    method = make(replace(given, initialization=P_init, sources=sources), scales=[0.5])
    assert torch.equal(method.prompt(), torch.tensor([[1 + 0.5 * 6, 2 + 0.5 * 4]]))
    assert method.facts == {"scale": 0.5}


def test_it_trains_as_many_parameters_as_the_paper_states(given: Given) -> None:
    """100 x 768 = 76 800 (Impact Statement)."""
    wide = replace(given, initialization=torch.zeros(100, 768), sources=torch.zeros(2, 100, 768))
    assert count(make(wide)) == 76_800


def test_it_is_prompt_tuning_from_the_sum(given: Given, task: Task) -> None:
    assert given.sources is not None
    ours, _ = fit(make(given), given, task)
    start = replace(given, initialization=given.initialization + given.sources.sum(dim=0))
    plain, _ = fit(PromptTuning(PromptTuningOptions(**{**OPTIONS, "steps": 10}), start), given, task)
    assert torch.equal(ours.snapshot.prompt, plain.snapshot.prompt)


def test_without_steps_the_sum_itself_is_the_result(given: Given, task: Task) -> None:
    assert given.sources is not None
    result, _ = fit(make(given, steps=0), given, task)
    assert torch.equal(result.snapshot.prompt, given.initialization + given.sources.sum(dim=0))
    assert (result.steps, result.best_step) == (0, 0)


def test_the_scale_of_the_best_validation_is_taken_and_the_first_one_on_ties(given: Given, rows: list[Row]) -> None:
    assert given.sources is not None
    scales = [1.0, 0.75, 0.7, 0.5, 0.25, 0.0]
    task = Task(train=rows, validation=rows, label_words=("yes", "no"))
    method = make(given, steps=0, scales=scales, evaluate_rows=8)
    examples = given.backbone.tokenize(rows[:8], method.options, 3)
    expected = [
        evaluate(
            given.backbone,
            given.initialization + scale * given.sources.sum(dim=0),
            examples,
            label_words=("yes", "no"),
            options=method.options,
        ).value
        for scale in scales
    ]
    assert len(set(expected)) > 1
    assert expected.count(max(expected)) > 1, "a tie has to be among them"

    events: list[dict[str, Any]] = []
    result = train(given.backbone, method, [task], options=method.options, seed=0, report=events.append)
    best = expected.index(max(expected))
    assert method.facts == {"scale": scales[best], "scales": scales, "values": expected}
    assert result.best_value == expected[best]
    searched = [(event["step"], event["scale"], event["value"]) for event in events if "scale" in event]
    assert searched == [(0, scale, value) for scale, value in zip(scales, expected, strict=True)]


def test_several_scales_need_validation_rows(given: Given, task: Task) -> None:
    with pytest.raises(OptionsError, match="chosen on validation rows, and the data have none"):
        fit(make(given, scales=[1.0, 0.5]), given, task)


def test_a_scale_is_a_finite_number() -> None:
    with pytest.raises(ValueError, match="finite"):
        TpvSumOptions(scales=[1.0, float("inf")])
