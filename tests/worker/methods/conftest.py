"""What the tests of single methods share: sources, a task, and backbones that a test may change."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tpv.methods import TrainingOptions
from tpv_worker.backbone import Backbone, Prompt
from tpv_worker.data import Row, Task
from tpv_worker.methods import Given, TuningMethod
from tpv_worker.training import TrainingResult, train

#: Few steps for a tiny model whose rows are `yes` or `no`.
OPTIONS: dict[str, Any] = {
    "steps": 40,
    "batch_size": 8,
    "schedule": "constant",
    "separator": "|",
    "max_source_tokens": 12,
    "max_target_tokens": 2,
}


@pytest.fixture
def given(backbone: Backbone, prompt: Tensor) -> Given:
    """Three sources of the initialization `prompt`."""
    sources = 0.5 * torch.randn(3, *prompt.shape, generator=torch.Generator().manual_seed(3))
    return Given(backbone=backbone, initialization=prompt, sources=sources, seed=7)


@pytest.fixture(params=["encoder-decoder", "decoder-only"])
def fresh(request: pytest.FixtureRequest, model_paths: dict[str, Path], prompt: Tensor) -> Given:
    """A backbone of its own, for methods that change the model."""
    return Given(backbone=Backbone.load(model_paths[request.param]), initialization=prompt, seed=7)


@pytest.fixture
def task(rows: list[Row]) -> Task:
    return Task(train=rows, label_words=("yes", "no"))


def fit(method: Any, given: Given, *tasks: Task, sources: Sequence[Task] = ()) -> tuple[TrainingResult, list[float]]:
    """Trains a method by its options; the result and the losses that it reported of the target's training."""
    losses: list[float] = []

    def report(event: dict[str, Any]) -> None:
        if event["type"] == "progress" and "stage" not in event:
            losses.append(event["loss"])

    result = train(given.backbone, method, tasks, sources, options=method.options, seed=given.seed, report=report)
    return result, losses


def count(method: TuningMethod) -> int:
    """Trained parameters."""
    return sum(parameter.numel() for group in method.parameter_groups() for parameter in group["params"])


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def same(tensors: Any, others: Any) -> bool:
    """Whether two mappings hold the same names and bytes."""
    return bool(tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors))


@torch.no_grad()
def scores(backbone: Backbone, prompt: Prompt, rows: Sequence[Row], task: int = 0) -> Tensor:
    """Log-probabilities of `yes` and `no` for rows of a task, (rows, 2)."""
    examples = backbone.tokenize(rows, TrainingOptions(**OPTIONS), 3, task)
    return backbone.label_scores(prompt, examples, [backbone.target_tokens(word) for word in ("yes", "no")])
