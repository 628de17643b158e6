"""What the lab's model is for: tuned prompts become vectors that move to other tasks as the world says they should."""

from __future__ import annotations

import itertools
from statistics import fmean

import pytest
import torch
from torch import Tensor

from tpv.methods import InitializeOptions, PromptTuningOptions
from tpv.similarity import cosine, pool
from tpv_worker import initialization
from tpv_worker.backbone import Backbone
from tpv_worker.data import Row, Task
from tpv_worker.evaluation import evaluate
from tpv_worker.lab import MODEL_DIRECTORY, world
from tpv_worker.lab.run import NUM_VIRTUAL_TOKENS, SOURCE_RATE, SOURCE_STEPS, TUNING
from tpv_worker.methods import Given, PromptTuning
from tpv_worker.training import TrainingResult, train

SOURCES = [  # every skill, and with three of them related and conflicting tasks
    world.task_named(name)
    for name in (
        "movie-tense-plus", "hotel-tense-plus", "music-tense-minus",
        "food-weather-plus", "phone-weather-plus",
        "music-place-plus", "school-place-minus",
        "school-formality-plus", "sport-number-plus", "school-certainty-plus", "food-time-plus",
        "travel-sentiment-minus",
    )
]  # fmt: skip
OPTIONS = PromptTuningOptions(
    **{**TUNING, "learning_rate": SOURCE_RATE}, steps=SOURCE_STEPS, evaluate_every=SOURCE_STEPS
)

pytestmark = pytest.mark.slow  # sources are tuned

Tuned = dict[world.Task, TrainingResult]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone.load(MODEL_DIRECTORY)


@pytest.fixture(scope="module")
def start(backbone: Backbone) -> Tensor:
    options = InitializeOptions(num_virtual_tokens=NUM_VIRTUAL_TOKENS, top_k=world.N_COMMON)
    return initialization.draw(options, 0, backbone.embeddings, backbone.tokenizer)


@pytest.fixture(scope="module")
def tuned(backbone: Backbone, start: Tensor) -> Tuned:
    given = Given(backbone=backbone, initialization=start)
    return {
        task: train(
            backbone,
            PromptTuning(OPTIONS, given),
            [Task(train=rows(task, 2000, seed=0), label_words=task.label_words)],
            options=OPTIONS,
            seed=0,
        )
        for task in SOURCES
    }


def rows(task: world.Task, n: int, seed: int) -> list[Row]:
    return [Row(row["source"], row["target"]) for row in world.rows(task, n, seed)]


def accuracy(backbone: Backbone, prompt: Tensor, task: world.Task) -> float:
    examples = backbone.tokenize(rows(task, 200, seed=1), OPTIONS, len(prompt))
    return evaluate(backbone, prompt, examples, label_words=task.label_words, options=OPTIONS).value


def vector(tuned: Tuned, task: world.Task, start: Tensor) -> Tensor:
    prompt = tuned[task].snapshot.prompt
    assert isinstance(prompt, Tensor)
    return prompt - start


def test_sources_are_learned_soon(backbone: Backbone, start: Tensor, tuned: Tuned) -> None:
    found = [accuracy(backbone, start + vector(tuned, task, start), task) for task in SOURCES]

    assert fmean(found) >= 0.98
    assert min(found) >= 0.9
    assert max(result.steps for result in tuned.values()) < SOURCE_STEPS  # the loss stopped them


def test_the_initialization_answers_at_chance(backbone: Backbone, start: Tensor) -> None:
    assert fmean(accuracy(backbone, start, task) for task in SOURCES) == pytest.approx(0.5, abs=0.2)


def test_a_related_vector_answers_a_task_that_nobody_tuned_and_a_flipped_one_answers_the_opposite(
    backbone: Backbone, start: Tensor, tuned: Tuned
) -> None:
    found: dict[str, list[float]] = {"related": [], "unrelated": [], "conflicting": []}
    for task, target in itertools.product(SOURCES, world.TARGETS):
        kind = world.relatedness(task, target)
        if kind != "unrelated":
            found[kind].append(accuracy(backbone, start + vector(tuned, task, start), target))

    assert fmean(found["related"]) >= 0.85
    assert fmean(found["conflicting"]) <= 0.15


def test_related_vectors_are_nearer_than_others(start: Tensor, tuned: Tuned) -> None:
    pooled = pool(torch.stack([vector(tuned, task, start) for task in SOURCES]))
    similar = cosine(pooled, pooled)
    found: dict[str, list[float]] = {"related": [], "unrelated": [], "conflicting": []}
    for i, j in itertools.combinations(range(len(SOURCES)), 2):
        found[world.relatedness(SOURCES[i], SOURCES[j])].append(float(similar[i, j]))

    assert min(found["related"]) > max(found["unrelated"] + found["conflicting"])
