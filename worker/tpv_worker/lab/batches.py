"""What the lab's model is pre-trained on: questions in natural words about the texts of `world`.

An input is a prefix of 20 words, the two label words, a text and `</s>`. A soft prompt later takes the place of the
prefix. Three kinds of batches share that form:

- question: the prefix asks about one skill, the decoder answers with a label word.
- quiz: the same, and the decoder then reads one question per other skill and answers each.
- describe: the decoder lists one word for every attribute.

In the fourth kind, glossary, the input is a single word that gives an attribute away, and the decoder names that
attribute. A cue among 50 other words hardly shows in the loss at first; here it is alone.

No batch asks about the combinations (domain, skill, label pair) of the target tasks, not even with distracting words.
A glossary has neither texts nor label words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from tpv_worker.lab import world
from tpv_worker.lab.world import EOS, FILLER_IDS, LABEL_IDS, PAD, QUESTION_IDS, SKILLS, Ints

Bools = npt.NDArray[np.bool_]
Kind = Literal["question", "quiz", "describe", "glossary"]
PREFIX_LENGTH = 20
NOT_SCORED = -100


@dataclass(frozen=True)
class Batch:
    inputs: Ints
    """Encoder token ids, padded on the right (n, length)."""
    targets: Ints
    """Decoder token ids (n, length): answers, and in a quiz the questions between them."""
    scored: Ints
    """The targets with NOT_SCORED in place of what the model need not predict."""
    skill: Ints
    """The skill asked by the prefix, or of the word in a glossary (n,); in a description 0."""


HELD_OUT = np.zeros((len(world.DOMAINS), len(SKILLS), len(world.LABEL_PAIRS)), dtype=bool)
"""[domain, skill, label pair]: the combinations of the target tasks, which no batch asks about."""
for _task in world.TARGETS:
    HELD_OUT[_task.combination] = True


def draw_batch(
    rng: np.random.Generator,
    kind: Kind,
    n: int,
    *,
    fewest_question_words: int = 1,
    plus_share: float = 0.5,
    unasked_share: float = 0.0,
    skills: int = len(SKILLS),
) -> Batch:
    """`n` examples of a kind. Questions and quizzes ask about the first `skills` skills only. `unasked_share` of the
    questions are left out and get a random answer, so that a prefix without a question, like an untrained prompt, is
    answered at chance."""
    if kind == "glossary":
        return _glossary(rng, n)
    if kind == "question":
        allowed = np.argwhere(~HELD_OUT[:, :skills])  # (combinations, 3)
        domain, skill, pair = allowed[rng.integers(0, len(allowed), n)].T
        order = skill[:, None]
    else:  # Quiz and description touch every skill, so the domain and label pair must have no held-out skill at all.
        allowed = np.argwhere(~HELD_OUT.any(axis=1))  # (combinations, 2)
        domain, pair = allowed[rng.integers(0, len(allowed), n)].T
        order = np.argsort(rng.random((n, skills)), axis=1)
    texts, attributes = world.draw_texts(rng, domain)
    if kind == "describe":
        prefix = FILLER_IDS[rng.integers(0, len(FILLER_IDS), (n, PREFIX_LENGTH))]
        prefix[np.arange(n), rng.integers(0, PREFIX_LENGTH, n)] = world.ids([world.DESCRIBE])[0]
        listed = [QUESTION_IDS[i, attributes[:, i], 0] for i in range(len(SKILLS))]
        description = np.stack([*listed, np.full(n, EOS)], axis=1)
        return Batch(_inputs(prefix, pair, texts), description, description, np.zeros(n, dtype=np.int64))

    asked = rng.random(n) >= unasked_share
    poles = (rng.random(order.shape) < plus_share).astype(np.int64)
    affirmed = np.take_along_axis(attributes, order, axis=1) == poles
    affirmed[:, 0] = np.where(asked, affirmed[:, 0], rng.random(n) < 0.5)
    answers = LABEL_IDS[pair[:, None], np.where(affirmed, 0, 1)]  # (n, questions)
    prefix = draw_prefixes(rng, domain, order[:, 0], poles[:, 0], pair, asked, fewest_question_words)
    targets, scored = [answers[:, 0]], [answers[:, 0]]
    for i in range(1, order.shape[1]):
        targets += [QUESTION_IDS[order[:, i], poles[:, i], rng.integers(0, 4, n)], answers[:, i]]
        scored += [np.full(n, NOT_SCORED), answers[:, i]]
    targets.append(np.full(n, EOS))
    scored.append(np.full(n, EOS))
    return Batch(_inputs(prefix, pair, texts), np.stack(targets, axis=1), np.stack(scored, axis=1), order[:, 0])


def draw_prefixes(
    rng: np.random.Generator, domain: Ints, skill: Ints, pole: Ints, pair: Ints, asked: Bools, fewest: int
) -> Ints:
    """Filler words with `fewest` to 10 question words at random places (n, 20).

    One prefix in five also has up to 3 words of the opposite pole, one in five up to 3 words of another skill: they
    are outnumbered, so the model learns to weigh words, as it must to follow a soft prompt.
    """
    n = len(skill)
    place = np.argsort(rng.random((n, PREFIX_LENGTH)), axis=1)  # a random order of the places of each prefix
    count = np.where(asked, rng.integers(fewest, 11, n), 0)
    other = (skill + rng.integers(1, len(SKILLS), n)) % len(SKILLS)

    def distracting() -> Ints:
        return np.where(rng.random(n) < 0.2, np.minimum(count // 2, rng.integers(1, 4, n)), 0)

    def question_words(of_skill: Ints, of_pole: Ints) -> Ints:
        return QUESTION_IDS[of_skill[:, None], of_pole[:, None], rng.integers(0, 4, (n, PREFIX_LENGTH))]

    ends = np.cumsum([count, distracting(), np.where(HELD_OUT[domain, other, pair], 0, distracting())], axis=0)
    return np.select(
        [place < end[:, None] for end in ends],
        [question_words(skill, pole), question_words(skill, 1 - pole), question_words(other, rng.integers(0, 2, n))],
        FILLER_IDS[rng.integers(0, len(FILLER_IDS), (n, PREFIX_LENGTH))],
    )


def _glossary(rng: np.random.Generator, n: int) -> Batch:
    skill, attribute = rng.integers(0, len(SKILLS), n), rng.integers(0, 2, n)
    words = np.array([rng.choice(world.GLOSSARY[s][a]) for s, a in zip(skill, attribute, strict=True)])
    end = np.full(n, EOS)
    named = np.stack([QUESTION_IDS[skill, attribute, rng.integers(0, 4, n)], end], axis=1)
    return Batch(np.stack([words, end], axis=1), named, named, skill)


def _inputs(prefix: Ints, pair: Ints, texts: Ints) -> Ints:
    inputs = np.concatenate([prefix, LABEL_IDS[pair], texts, np.full((len(texts), 1), PAD)], axis=1)
    inputs[np.arange(len(inputs)), (inputs != PAD).sum(axis=1)] = EOS
    return inputs[:, : int((inputs != PAD).sum(axis=1).max())]
