from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tests.worker.methods.conftest import OPTIONS, copies, count, fit, same, scores

from tpv.methods import FullOptions
from tpv_worker.backbone import Backbone
from tpv_worker.data import Row, Task
from tpv_worker.methods import Given
from tpv_worker.methods.full import Full


def make(given: Given, **options: Any) -> Full:
    return Full(FullOptions(**{**OPTIONS, "learning_rate": 1e-2, **options}), given)


def test_it_trains_every_weight_once(fresh: Given) -> None:
    assert count(make(fresh)) == fresh.backbone.model.num_parameters()


def test_the_loss_falls_and_every_matrix_changes(fresh: Given, task: Task) -> None:
    weights = copies(fresh.backbone.model.state_dict())
    _, losses = fit(make(fresh), fresh, task)
    assert losses[-1] < 0.5 * losses[0]
    after = fresh.backbone.model.state_dict()
    assert all(not torch.equal(weights[name], after[name]) for name in weights)


def test_a_rounded_model_is_trained_in_float32(fresh: Given) -> None:
    fresh.backbone.model.bfloat16()
    assert {weight.dtype for weight in make(fresh).snapshot().tensors.values()} == {torch.float32}


def test_tied_weights_stay_tied(fresh: Given, task: Task) -> None:
    def ties() -> set[tuple[str, str]]:
        named = list(fresh.backbone.model.named_parameters(remove_duplicate=False))
        return {(a, b) for a, x in named for b, y in named if a < b and x is y}

    before = ties()
    assert bool(before) == (fresh.backbone.kind == "encoder-decoder")  # T5's embeddings
    method = make(fresh, steps=2)
    result, _ = fit(method, fresh, task)
    method.load(result.snapshot.tensors)
    assert ties() == before


def test_the_best_step_is_what_is_left_in_the_model(fresh: Given, task: Task, rows: list[Row]) -> None:
    method = make(fresh, learning_rate=0.3, evaluate_every=1, steps=8)
    result, _ = fit(method, fresh, replace(task, validation=rows))
    assert result.best_step < result.steps
    assert same(result.snapshot.tensors, dict(fresh.backbone.model.named_parameters()))


def test_the_same_seed_gives_the_same_bytes_and_the_weights_predict_the_same(
    fresh: Given, task: Task, rows: list[Row], model_paths: dict[str, Path]
) -> None:
    again = replace(fresh, backbone=Backbone.load(model_paths[fresh.backbone.kind]))
    first, second = (fit(make(given, steps=3), given, task)[0].snapshot for given in (fresh, again))
    assert same(first.tensors, second.tensors)
    third = replace(fresh, backbone=Backbone.load(model_paths[fresh.backbone.kind]))
    method = make(third)
    method.load(first.tensors)
    assert first.prompt.shape == (0, 16)
    assert torch.equal(scores(third.backbone, method.prompt(), rows), scores(fresh.backbone, first.prompt, rows))
