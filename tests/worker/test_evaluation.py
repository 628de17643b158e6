from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tpv.methods import TrainingOptions
from tpv_worker.backbone import Backbone
from tpv_worker.data import Row
from tpv_worker.evaluation import evaluate, majority

OPTIONS = TrainingOptions(batch_size=5, max_target_tokens=3)


def test_predictions_come_in_the_order_of_the_rows(backbone: Backbone, prompt: Tensor, rows: list[Row]) -> None:
    evaluation = evaluate(
        backbone, prompt, backbone.tokenize(rows, OPTIONS, len(prompt)), label_words=("yes", "no"), options=OPTIONS
    )
    alone = [
        evaluate(
            backbone, prompt, backbone.tokenize([row], OPTIONS, len(prompt)), label_words=("yes", "no"), options=OPTIONS
        )
        for row in rows
    ]
    assert evaluation.predictions == [one.predictions[0] for one in alone]
    assert evaluation.value == pytest.approx(sum(one.value for one in alone) / len(rows))
    assert evaluation.n == len(rows)


def test_a_generated_text_counts_when_it_is_the_target(backbone: Backbone, prompt: Tensor) -> None:
    sources = ["w1 w2", "w3", "w9 w8 w7"]
    examples = backbone.tokenize([Row(source, "yes") for source in sources], OPTIONS, len(prompt))
    texts = evaluate(backbone, prompt, examples, label_words=None, options=OPTIONS).predictions
    # A written text of up to three words is right as target; one that was cut has four and is never right.
    rows = [Row(source, " ".join(text.split()[:3]) or "yes") for source, text in zip(sources, texts, strict=True)]
    right = sum(0 < len(text.split()) < 4 for text in texts)
    examples = backbone.tokenize(rows, OPTIONS, len(prompt))
    assert evaluate(backbone, prompt, examples, label_words=None, options=OPTIONS).value == right / 3


def test_evaluation_leaves_no_gradient(backbone: Backbone, prompt: Tensor, rows: list[Row]) -> None:
    prompt.requires_grad_()
    evaluate(
        backbone, prompt, backbone.tokenize(rows, OPTIONS, len(prompt)), label_words=("yes", "no"), options=OPTIONS
    )
    assert prompt.grad is None
    assert torch.is_grad_enabled()


def test_majority_answers_with_the_most_frequent_training_target() -> None:
    train = [Row("", target) for target in ("no", "yes", "yes", "no", "maybe")]
    baseline = majority(train, [Row("", target) for target in ("no", "yes", "no ", "maybe")])
    assert (baseline.value, baseline.n, baseline.predictions) == (0.5, 4, ["no"] * 4)


@pytest.mark.parametrize("label_words", [("yes", "no"), None])
def test_where_memory_runs_out_fewer_rows_are_read_at_a_time(
    backbone: Backbone,
    prompt: Tensor,
    rows: list[Row],
    label_words: tuple[str, ...] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    examples = backbone.tokenize(rows, OPTIONS, len(prompt))
    whole = evaluate(backbone, prompt, examples, label_words=label_words, options=OPTIONS)
    for name in ("label_scores", "generate"):
        read = getattr(backbone, name)

        def small(prompt: Tensor, batch: list[Row], limit: object, read: Any = read, fits: int = 2) -> object:
            if len(batch) > fits:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return read(prompt, batch, limit)

        monkeypatch.setattr(backbone, name, small)
    assert evaluate(backbone, prompt, examples, label_words=label_words, options=OPTIONS) == whole
    monkeypatch.setattr(backbone, "label_scores" if label_words else "generate", partial(small, fits=0))
    with pytest.raises(torch.OutOfMemoryError):
        evaluate(backbone, prompt, examples, label_words=label_words, options=OPTIONS)
