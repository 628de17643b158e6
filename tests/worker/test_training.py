from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tpv.files import fingerprint
from tpv.methods import DtvgOptions, PromptTuningOptions, TrainingOptions
from tpv_worker.backbone import Backbone
from tpv_worker.data import Row
from tpv_worker.errors import DataError, TrainingDiverged
from tpv_worker.evaluation import evaluate
from tpv_worker.methods import Dtvg, PromptTuning, TuningMethod
from tpv_worker.training import LOG_EVERY, TrainingResult, rate, train

OPTIONS: dict[str, Any] = {"steps": 30, "batch_size": 8, "learning_rate": 0.1, "evaluate_every": 10, "separator": "|"}


def prompt_tuning(initialization: Tensor, **options: Any) -> PromptTuning:
    return PromptTuning(PromptTuningOptions(**{**OPTIONS, **options}), initialization)


def dtvg(initialization: Tensor, **options: Any) -> Dtvg:
    vectors = 0.3 * torch.randn(4, *initialization.shape, generator=torch.Generator().manual_seed(3))
    return Dtvg(
        DtvgOptions(**{**OPTIONS, "source_scale_learning_rate": 0.1, **options}),
        initialization,
        target=vectors[0],
        sources=vectors[1:],
    )


def run(
    backbone: Backbone, method: PromptTuning | Dtvg, rows: list[Row], validation: list[Row], seed: int = 0, **more: Any
) -> TrainingResult:
    return train(
        backbone, method, rows, validation, label_words=("yes", "no"), options=method.options, seed=seed, **more
    )


@pytest.mark.parametrize("make", [prompt_tuning, dtvg])
def test_the_loss_falls_and_the_frozen_weights_stay(
    backbone: Backbone, prompt: Tensor, rows: list[Row], make: Callable[..., PromptTuning | Dtvg]
) -> None:
    weights = {name: weight.clone() for name, weight in backbone.model.state_dict().items()}
    losses: list[float] = []
    method = make(prompt, steps=60, learning_rate=0.5, schedule="constant")
    result = run(backbone, method, rows, rows, report=lambda event: losses.append(event.get("loss", np.nan)))
    losses = [loss for loss in losses if not np.isnan(loss)]
    assert losses[-1] < 0.9 * losses[0]
    assert result.loss == losses[-1]
    after = backbone.model.state_dict()
    assert weights.keys() == after.keys()
    assert all(torch.equal(weights[name], after[name]) for name in weights)
    assert all(weight.grad is None for weight in backbone.model.parameters())


@pytest.mark.parametrize("make", [prompt_tuning, dtvg])
def test_the_same_seed_gives_the_same_bytes(
    backbone: Backbone, prompt: Tensor, rows: list[Row], make: Callable[..., PromptTuning | Dtvg]
) -> None:
    first, second, other = (run(backbone, make(prompt), rows, [], seed) for seed in (5, 5, 6))
    assert fingerprint(first.prompt.numpy()) == fingerprint(second.prompt.numpy())
    assert fingerprint(first.prompt.numpy()) != fingerprint(other.prompt.numpy())
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)
    assert first.groups == second.groups


def test_the_global_random_state_is_left_alone(backbone: Backbone, prompt: Tensor, rows: list[Row]) -> None:
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    run(backbone, dtvg(prompt), rows, rows)
    assert torch.equal(torch_before, torch.get_rng_state())
    assert (numpy_before == np.random.get_state()[1]).all()


@pytest.mark.parametrize("make", [prompt_tuning, dtvg])
def test_the_best_step_is_kept_the_first_on_ties(
    backbone: Backbone, prompt: Tensor, rows: list[Row], make: Callable[..., PromptTuning | Dtvg]
) -> None:
    method = make(prompt, steps=33, evaluate_every=3, schedule="constant")
    result = run(backbone, method, rows, rows[:10])
    steps, values = zip(*result.validations, strict=True)
    assert steps == (*range(3, 33, 3), 33)
    assert result.best_value == max(values)
    assert result.best_step == steps[values.index(max(values))]
    assert result.steps == 33
    examples = backbone.tokenize(rows[:10], method.options, len(prompt))
    again = evaluate(backbone, result.prompt, examples, label_words=("yes", "no"), options=method.options)
    assert again.value == result.best_value
    shorter = run(backbone, make(prompt, schedule="constant", steps=result.best_step), rows, [])
    assert torch.equal(shorter.prompt, result.prompt), "no later step may have changed it"


def test_without_validation_rows_the_last_step_is_kept(backbone: Backbone, prompt: Tensor, rows: list[Row]) -> None:
    method = prompt_tuning(prompt)
    result = run(backbone, method, rows, [])
    assert (result.best_step, result.best_value, result.validations) == (30, None, [])
    assert torch.equal(result.prompt, method.P.detach())


def test_validation_looks_at_the_first_rows_only(backbone: Backbone, prompt: Tensor, rows: list[Row]) -> None:
    result = run(backbone, prompt_tuning(prompt, evaluate_rows=1), rows, rows)
    assert {value for _, value in result.validations} <= {0.0, 1.0}


def test_training_stops_when_the_running_loss_is_low(backbone: Backbone, prompt: Tensor, rows: list[Row]) -> None:
    events: list[dict[str, Any]] = []
    result = run(backbone, prompt_tuning(prompt, stop_below=100, evaluate_every=50), rows, rows, report=events.append)
    assert result.steps == LOG_EVERY
    assert result.validations[-1][0] == result.best_step == LOG_EVERY
    assert [event["type"] for event in events] == ["progress", "evaluation"]


def test_the_first_step_with_a_loss_that_is_no_number_is_named(
    backbone: Backbone, prompt: Tensor, rows: list[Row]
) -> None:
    class Breaks(PromptTuning):
        calls = 0

        def prompt(self) -> Tensor:
            self.calls += 1
            return self.P * torch.nan if self.calls == 7 else self.P

    with pytest.raises(TrainingDiverged, match="the loss is no finite number at step 7") as raised:
        run(backbone, Breaks(PromptTuningOptions(**OPTIONS), prompt), rows, [])
    assert (raised.value.reason, raised.value.step) == ("nan-loss", 7)


def test_a_prompt_that_is_no_number_is_never_a_result(backbone: Backbone, prompt: Tensor, rows: list[Row]) -> None:
    method = prompt_tuning(prompt, steps=1, learning_rate=1e37)
    method.P.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(TrainingDiverged, match="the soft prompt is no finite number at step 1"):
        run(backbone, method, rows, [])


def test_events_tell_the_run_in_order(backbone: Backbone, prompt: Tensor, rows: list[Row]) -> None:
    events: list[dict[str, Any]] = []
    result = run(backbone, dtvg(prompt, steps=12, evaluate_every=5), rows, rows, report=events.append)
    assert [event["step"] for event in events] == sorted(event["step"] for event in events)
    assert [event["step"] for event in events if event["type"] == "progress"] == [5, 10, 12]
    assert [(e["step"], e["value"]) for e in events if e["type"] == "evaluation"] == result.validations
    assert [(e["step"], tuple(e["members"])) for e in events if e["type"] == "group"] == result.groups
    assert result.groups[0][0] == 1
    assert all(before[1] != after[1] for before, after in zip(result.groups, result.groups[1:], strict=False))
    assert events[-1] == {"type": "evaluation", "step": 12, "metric": "accuracy", "value": result.validations[-1][1]}


def test_what_report_raises_ends_the_run(backbone: Backbone, prompt: Tensor, rows: list[Row]) -> None:
    def cancel(event: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(backbone, prompt_tuning(prompt), rows, rows, report=cancel)


def test_bad_rows_are_found_before_the_first_step(backbone: Backbone, prompt: Tensor, rows: list[Row]) -> None:
    method: TuningMethod = prompt_tuning(prompt)
    long = [Row("w1", " ".join(["w2"] * 17))]
    for train_rows, validation_rows in (([], rows), (long, rows), (rows, long)):
        with pytest.raises(DataError):
            run(backbone, method, train_rows, validation_rows)  # type: ignore[arg-type]
    assert torch.equal(method.snapshot().prompt, prompt)


def test_schedules() -> None:
    linear = TrainingOptions(steps=10, warmup_steps=4, schedule="linear")
    assert [rate(step, linear) for step in range(1, 11)] == pytest.approx(
        [1 / 5, 2 / 5, 3 / 5, 4 / 5, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    )
    constant = TrainingOptions(steps=10, warmup_steps=1, schedule="constant")
    assert [rate(step, constant) for step in range(1, 11)] == [0.5] + [1.0] * 9


def test_a_clipped_gradient_has_the_norm_asked_for(backbone: Backbone, prompt: Tensor, rows: list[Row]) -> None:
    """AdamW hides a gradient's scale unless epsilon is large: then the first step is rate * gradient / epsilon."""
    options = {"steps": 1, "learning_rate": 1.0, "adam_epsilon": 1e3, "weight_decay": 0.0, "clip_norm": 1e-2}
    result = run(backbone, prompt_tuning(prompt, **options), rows, [])
    assert float((result.prompt - prompt).norm()) == pytest.approx(1e-2 / 1e3, rel=0.01)
