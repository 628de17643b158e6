"""How good a soft prompt is on rows: deterministic predictions, and the majority-class baseline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from tpv.methods import TrainingOptions
from tpv_worker import memory, parallel
from tpv_worker.backbone import Backbone, Prompt
from tpv_worker.data import Example, Row


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A metric over n rows and what was predicted for each, in their order."""

    metric: Literal["accuracy"]
    value: float  #: share of right predictions, 0 to 1
    n: int
    predictions: list[str]


@torch.no_grad()
def evaluate(
    backbone: Backbone,
    prompt: Prompt,
    examples: Sequence[Example],
    *,
    label_words: Sequence[str] | None,
    options: TrainingOptions,
) -> Evaluation:
    """Accuracy of a prompt on tokenized rows.

    With label words the prediction is the most likely of them. Without, it is the text that greedy decoding writes,
    and it counts when it equals the target, both stripped of surrounding white space. Where `batch_size` rows do not
    fit the memory, fewer are read at a time.
    """
    labels = backbone.label_tokens(label_words or (), options)
    fitting = options.batch_size  # rows at a time, as far as is known

    def predict(batch: Sequence[Example]) -> list[str]:
        nonlocal fitting
        half = len(batch) // 2
        if len(batch) <= fitting:
            try:
                if label_words:
                    best = backbone.label_scores(prompt, batch, labels).argmax(dim=1).tolist()
                    return [label_words[i] for i in best]
                # One token more than a target has, so that a text which only begins like the target is not cut to it.
                return backbone.generate(prompt, batch, options.max_target_tokens + 1)
            except Exception as error:  # allocators have no class of their own; whatever else it is goes on
                if len(batch) == 1 or not memory.has_run_out(error):
                    raise
            torch.cuda.empty_cache()
            fitting = half
        return predict(batch[:half]) + predict(batch[half:])

    # Rows of about equal length together: the answer does not depend on padding, the time does.
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].source))
    found: dict[int, str] = {}
    rank, size = parallel.rank_and_size()
    for start in range(rank * options.batch_size, len(order), size * options.batch_size):
        indices = order[start : start + options.batch_size]
        texts = predict([examples[i] for i in indices])
        found |= {i: text.strip() for i, text in zip(indices, texts, strict=True)}
    found = {i: text for part in parallel.gathered(found) for i, text in part.items()}
    predictions = [found[i] for i in range(len(examples))]
    return _accuracy(predictions, [example.text for example in examples])


def majority(train_rows: Sequence[Row], rows: Sequence[Row]) -> Evaluation:
    """The baseline that always answers with the most frequent target of the training rows (the first one on ties)."""
    answer = Counter(row.target.strip() for row in train_rows).most_common(1)[0][0]
    return _accuracy([answer] * len(rows), [row.target for row in rows])


def _accuracy(predictions: list[str], targets: Sequence[str]) -> Evaluation:
    right = sum(prediction == target.strip() for prediction, target in zip(predictions, targets, strict=True))
    return Evaluation(metric="accuracy", value=right / len(targets), n=len(targets), predictions=predictions)
