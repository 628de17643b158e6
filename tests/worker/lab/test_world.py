"""The world of the lab keeps its promises: labels, hold-out, vocabulary, and a model that understands it."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from tpv_worker.lab import MODEL_DIRECTORY, batches, world
from tpv_worker.lab.world import (
    DOMAINS,
    LABEL_NOISE,
    REFERENCE,
    SKILLS,
    SOURCES,
    TARGETS,
    Task,
    relatedness,
    rows,
    task_named,
    training_rows,
)


def word_set(text: str) -> set[str]:
    return set(text.split())


PAST = word_set(
    "performed filmed rehearsed served cleaned welcomed rang loaded vibrated studied explained revised "
    "played sang recorded ran jumped scored cooked baked tasted departed arrived travelled was were"
)
FORMAL = word_set("sir madam colleague")
FINE = word_set("sun heat sunshine warmth")
INDOORS = word_set("kitchen hall office cellar")
SURE = word_set("surely certainly definitely clearly")
DAY = word_set("dawn noon midday daybreak")
PRAISE = word_set("lovely great superb charming")

ATTRIBUTE_BY_READING = {
    "tense": lambda words: bool(words & PAST),
    "formality": lambda words: bool(words & FORMAL),
    "number": lambda words: bool(words & {"are", "were"}),
    "weather": lambda words: bool(words & FINE),
    "place": lambda words: bool(words & INDOORS),
    "certainty": lambda words: bool(words & SURE),
    "time": lambda words: bool(words & DAY),
    "sentiment": lambda words: bool(words & PRAISE),
}

LABELS = {word: pair for pair in world.LABEL_PAIRS for word in pair}
SKILL_OF_QUESTION_WORD = {word: skill.name for skill in SKILLS for word in (*skill.plus, *skill.minus)}
DOMAIN_OF_NOUN = {noun: name for name, (nouns, _) in DOMAINS.items() for noun in re.split(r"[ |]", nouns)}
HELD_OUT = {(task.domain, task.skill, task.label_words) for task in TARGETS}


@pytest.mark.parametrize("skill", world.SKILL_NAMES)
def test_labels_agree_with_what_the_text_says(skill: str) -> None:
    for row in rows(Task("school", skill), 200, seed=1):
        holds = ATTRIBUTE_BY_READING[skill](set(row["source"].split()))
        assert row["target"] == ("yes" if holds else "no")


def test_a_flipped_task_gives_opposite_labels_to_equal_texts() -> None:
    plus, minus = rows(task_named("music-tense-plus"), 50, 3), rows(task_named("music-tense-minus"), 50, 3)

    assert [row["source"] for row in plus] == [row["source"] for row in minus]
    assert all({a["target"], b["target"]} == {"yes", "no"} for a, b in zip(plus, minus, strict=True))


def test_attributes_are_independent_so_that_no_skill_gives_another_away() -> None:
    _, attributes = world.draw_texts(np.random.default_rng(0), np.zeros(20_000, dtype=np.int64))

    assert np.abs(np.corrcoef(attributes.T) - np.eye(len(SKILLS))).max() < 0.03
    assert attributes.mean(axis=0) == pytest.approx(np.full(len(SKILLS), 0.5), abs=0.02)


def test_the_same_seed_gives_the_same_rows_and_another_seed_others() -> None:
    task = SOURCES[0]

    assert rows(task, 20, seed=5) == rows(task, 20, seed=5)
    assert rows(task, 20, seed=5) != rows(task, 20, seed=6)


def test_a_source_starts_with_the_label_words_of_its_task() -> None:
    task = task_named("food-number-minus.true-false")

    assert {row["target"] for row in rows(task, 30, 0)} == {"true", "false"}
    assert all(row["source"].startswith("true false ") for row in rows(task, 30, 0))


def test_names_lead_back_to_their_tasks() -> None:
    tasks = [*SOURCES, *TARGETS, Task("hotel", "weather", "minus", ("agree", "refuse"))]

    assert [task_named(task.name) for task in tasks] == tasks
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9.-]*", task.name) for task in tasks)


@pytest.mark.parametrize("name", ["phone-tense", "phone-tense-up", "moon-tense-plus", "phone-tense-plus.yes-false", ""])
def test_an_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="lab"):
        task_named(name)


def test_the_training_rows_of_targets_alone_have_wrong_answers() -> None:
    for task in TARGETS:
        found, right = training_rows(task, 2000, 7), rows(task, 2000, 7)
        assert [row["source"] for row in found] == [row["source"] for row in right]
        assert {row["target"] for row in found} == set(task.label_words)
        wrong = np.mean([a["target"] != b["target"] for a, b in zip(found, right, strict=True)])
        assert wrong == pytest.approx(LABEL_NOISE, abs=0.03)
    assert all(training_rows(task, 20, 7) == rows(task, 20, 7) for task in (*SOURCES, *REFERENCE))


def test_no_task_of_the_reference_pool_has_the_domain_and_skill_of_another_one_here() -> None:
    others = {(task.domain, task.skill) for task in (*SOURCES, *TARGETS)}

    assert others.isdisjoint((task.domain, task.skill) for task in REFERENCE)
    assert len(set(REFERENCE)) == len(REFERENCE) > len(SOURCES)
    assert all(sum(task.skill == skill for task in REFERENCE) == 4 for skill in world.SKILL_NAMES)


def test_every_target_has_a_related_source_of_another_domain_and_some_a_conflicting_one() -> None:
    for target in TARGETS:
        assert any(relatedness(target, s) == "related" and s.domain != target.domain for s in SOURCES)
    assert {relatedness(task_named("phone-tense-plus"), source) for source in SOURCES} == {
        "related", "unrelated", "conflicting",
    }  # fmt: skip


def test_common_words_ask_and_give_away_nothing() -> None:
    common = set(world.VOCABULARY[: world.N_COMMON])
    cues = PAST | FORMAL | FINE | INDOORS | SURE | DAY | PRAISE | {"is", "are"}

    assert common == {*world.SPECIAL, *world.FILLER}
    assert common.isdisjoint(SKILL_OF_QUESTION_WORD.keys() | LABELS.keys() | DOMAIN_OF_NOUN.keys() | cues)


def asked_about(batch: batches.Batch) -> set[tuple[str, str, tuple[str, str]]]:
    """What the examples of a batch ask, read from their words: every (domain, skill, label pair)."""
    seen = set()
    for inputs, targets in zip(batch.inputs, batch.targets, strict=True):
        words = [*world.text_of(inputs).split(), *world.text_of(targets).split()]
        (domain,) = {DOMAIN_OF_NOUN[word] for word in words if word in DOMAIN_OF_NOUN}
        (pair,) = {LABELS[word] for word in words if word in LABELS}
        seen |= {(domain, SKILL_OF_QUESTION_WORD[word], pair) for word in words if word in SKILL_OF_QUESTION_WORD}
    return seen


@pytest.mark.parametrize("kind", ["question", "quiz", "describe"])
def test_pretraining_never_asks_what_the_targets_ask(kind: batches.Kind) -> None:
    for seed in range(3):
        batch = batches.draw_batch(np.random.default_rng(seed), kind, 2000)
        assert asked_about(batch).isdisjoint(HELD_OUT)


@pytest.mark.parametrize("kind", ["question", "quiz"])
def test_early_pretraining_asks_about_the_first_skills_only(kind: batches.Kind) -> None:
    batch = batches.draw_batch(np.random.default_rng(0), kind, 500, skills=3)

    assert {*batch.skill} == {0, 1, 2}
    assert (batch.scored >= 0).sum(axis=1).max() == (2 if kind == "question" else 4)  # answers and the end


def test_a_glossary_names_what_a_single_word_gives_away() -> None:
    batch = batches.draw_batch(np.random.default_rng(0), "glossary", 500)
    holding = {word for skill in SKILLS for word in skill.plus}
    read = {*world.SKILL_NAMES} - {"number", "formality"}  # of which a text has more cues than this file reads

    for inputs, targets in zip(batch.inputs, batch.targets, strict=True):
        (cue, _), (named, _) = world.text_of(inputs).split(), world.text_of(targets).split()
        skill = SKILL_OF_QUESTION_WORD[named]
        assert skill not in read or ATTRIBUTE_BY_READING[skill]({cue}) == (named in holding)


def test_pretraining_asks_everything_but_what_the_targets_ask() -> None:
    seen = asked_about(batches.draw_batch(np.random.default_rng(0), "question", 5000))

    assert len(seen) == len(DOMAINS) * len(SKILLS) * len(world.LABEL_PAIRS) - len(HELD_OUT)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL_DIRECTORY)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForSeq2SeqLM.from_pretrained(MODEL_DIRECTORY)


def test_the_tokenizer_knows_every_word_and_ends_every_text(tokenizer: Any) -> None:
    texts = [text for task in (*SOURCES, *TARGETS) for row in rows(task, 200, 0) for text in row.values()]
    encoded = tokenizer(texts)["input_ids"]

    assert all(tokenizer.unk_token_id not in ids and ids[-1] == tokenizer.eos_token_id for ids in encoded)
    assert [tokenizer.decode(ids[:-1]) for ids in encoded[:50]] == texts[:50]


def test_the_tokenizer_numbers_words_as_the_world_does(tokenizer: Any) -> None:
    assert tokenizer.convert_ids_to_tokens(range(len(world.VOCABULARY))) == list(world.VOCABULARY)
    assert tokenizer("yes")["input_ids"] == [*world.ids(["yes"]), world.EOS]


def test_the_model_is_small_and_takes_every_word(model: Any) -> None:
    assert sum(parameter.numel() for parameter in model.parameters()) == 255_296
    assert model.get_input_embeddings().weight.shape == (len(world.VOCABULARY), 64)
    assert (MODEL_DIRECTORY / "model.safetensors").stat().st_size <= 1_200_000


@pytest.mark.parametrize("skill", SKILLS, ids=lambda skill: skill.name)
def test_the_model_answers_questions_in_natural_words(skill: world.Skill, model: Any, tokenizer: Any) -> None:
    prefix = "please read it carefully and tell me which one meant by this {} {} {} {} text now here below"
    tasks = (Task("music", skill.name, "plus"), Task("sport", skill.name, "minus"))
    questions, answers = [], []
    for task in tasks:
        for row in rows(task, 50, seed=11):
            questions.append(f"{prefix.format(*getattr(skill, task.pole))} {row['source']}")
            answers.append(row["target"])

    with torch.no_grad():
        generated = model.generate(**tokenizer(questions, padding=True, return_tensors="pt"))
    right = np.array(tokenizer.batch_decode(generated, skip_special_tokens=True)) == np.array(answers)

    assert right.mean() >= 0.9
