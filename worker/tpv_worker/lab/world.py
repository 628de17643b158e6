"""The small built-in world of the lab: a text grammar, four skills, and the tasks made of them.

Every text carries one binary attribute per skill, drawn independently, so nothing in a text tells which skill is
asked about: only the prompt can. A task is a question about one attribute in one domain, answered with one pair of
label words. The minus pole of a skill asks the opposite question: such tasks conflict with the plus pole.

    source: yes no good evening sir , the lovely teachers explained near the park under the rain . i say ...
    target: yes                                           (task school-tense-plus: "is it in the past tense?")

A source starts with its two label words, so that a task prompt vector need not encode them.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Pole = Literal["plus", "minus"]
Relatedness = Literal["related", "unrelated", "conflicting"]


@dataclass(frozen=True)
class Skill:
    """One binary attribute of every text, and the words that ask for it."""

    name: str
    holds: str
    """When the attribute is 1."""
    plus: tuple[str, ...]
    """Question words, all synonyms: the answer is the first label word if the attribute is 1."""
    minus: tuple[str, ...]
    """Question words of the opposite question."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


SKILLS = (
    Skill(
        "tense",
        "the verbs are in the past tense",
        plus=_words("bygone earlier finished previous"),
        minus=_words("current ongoing nowadays continuing"),
    ),
    Skill(
        "formality",
        "the greeting is formal",
        plus=_words("polite formal courteous official"),
        minus=_words("casual slangy informal colloquial"),
    ),
    Skill(
        "number",
        "the subjects are plural",
        plus=_words("several plural many group"),
        minus=_words("single singular alone individual"),
    ),
    Skill(
        "weather",
        "the weather is fine",
        plus=_words("sunny bright hot clear"),
        minus=_words("wet cold gloomy cloudy"),
    ),
)

LABEL_PAIRS = (("yes", "no"), ("true", "false"), ("right", "wrong"), ("agree", "refuse"))

# Per domain: nouns (singular plural) and verbs (present singular, present plural, past).
DOMAINS = {
    "movie": (
        "actor actors|scene scenes|director directors|script scripts|dancer dancers|camera cameras",
        "performs perform performed|films film filmed|rehearses rehearse rehearsed",
    ),
    "hotel": (
        "room rooms|porter porters|lobby lobbies|guest guests|maid maids|suite suites",
        "serves serve served|cleans clean cleaned|welcomes welcome welcomed",
    ),
    "phone": (
        "screen screens|battery batteries|speaker speakers|charger chargers|button buttons|app apps",
        "rings ring rang|loads load loaded|vibrates vibrate vibrated",
    ),
    "school": (
        "teacher teachers|pupil pupils|lesson lessons|tutor tutors|exam exams|desk desks",
        "studies study studied|explains explain explained|revises revise revised",
    ),
    "music": (
        "singer singers|guitar guitars|drummer drummers|melody melodies|concert concerts|album albums",
        "plays play played|sings sing sang|records record recorded",
    ),
    "sport": (
        "runner runners|coach coaches|match matches|goalkeeper goalkeepers|race races|player players",
        "runs run ran|jumps jump jumped|scores score scored",
    ),
    "food": (
        "soup soups|chef chefs|waiter waiters|cake cakes|pasta pastas|baker bakers",
        "cooks cook cooked|bakes bake baked|tastes taste tasted",
    ),
    "travel": (
        "train trains|pilot pilots|ticket tickets|driver drivers|flight flights|tourist tourists",
        "departs depart departed|arrives arrive arrived|travels travel travelled",
    ),
}

SPECIAL = ("<pad>", "</s>", "<unk>")
PAD, EOS, UNK = 0, 1, 2

# The "most common words": they ask nothing, so prompts initialized from them answer at chance. No word here is a cue.
FILLER = _words(
    "answer the question about this text please read it carefully and tell me what you see here now for each case "
    "below given as follows in your own view we want to know whether which one meant by passage example input task "
    "label output sentence story note item line piece part"
)
DESCRIBE = "describe"  # The instruction of pre-training that asks for all attributes at once.

# In every two-row table below, row 1 is the attribute holding and row 0 the opposite.
_GREETINGS = (
    ("hey dude yo", "hi buddy hey", "yo mate sup", "sup folks hi"),
    ("good evening sir", "dear madam hello", "esteemed colleague greetings", "kind regards madam"),
)
_WEATHER = (_words("rain storm snow hail"), _words("sun heat sunshine warmth"))
_BE = (("is", "was"), ("are", "were"))  # [number][tense]
_PLACES = _words("kitchen hall office library cellar attic park beach field street forest garden")
_ADJECTIVES = _words("lovely great superb charming pleasant splendid awful horrible nasty dismal poor miserable")
_ADVERBS = _words("really quite very")


def _vocabulary() -> tuple[str, ...]:
    words = [*SPECIAL, *FILLER, DESCRIBE]
    for pair in LABEL_PAIRS:
        words += pair
    for skill in SKILLS:
        words += [*skill.plus, *skill.minus]
    words += _words("the i we think say near under , .")
    for nouns, verbs in DOMAINS.values():
        words += f"{nouns}|{verbs}".replace("|", " ").split()
    for table in (_GREETINGS, _WEATHER, _BE):
        words += " ".join(word for row in table for word in row).split()
    words += [*_PLACES, *_ADJECTIVES, *_ADVERBS]
    return tuple(dict.fromkeys(words))


VOCABULARY = _vocabulary()
N_COMMON = len(SPECIAL) + len(FILLER)
"""Token ids below this are special or filler words: the `top_k` of a random-vocab initialization in this world."""

DOMAIN_NAMES = tuple(DOMAINS)
SKILL_NAMES = tuple(skill.name for skill in SKILLS)
_ID = {word: index for index, word in enumerate(VOCABULARY)}


def ids(words: tuple[str, ...] | list[str]) -> Ints:
    """Token ids of the words. Raises KeyError for a word outside the vocabulary."""
    return np.array([_ID[word] for word in words], dtype=np.int64)


def text_of(token_ids: Ints) -> str:
    """The words of a row of token ids, separated by one blank, without padding."""
    return " ".join(VOCABULARY[i] for i in token_ids if i != PAD)


def _grid(cells: list[list[str]]) -> Ints:
    """Ids of a table whose cells hold equally many words, (rows, columns, words)."""
    return np.stack([np.stack([ids(cell.split()) for cell in row]) for row in cells])


FILLER_IDS = ids(FILLER)
LABEL_IDS = np.stack([ids(pair) for pair in LABEL_PAIRS])  # (label pair, 2), the affirming word first
QUESTION_IDS = np.stack([np.stack([ids(skill.minus), ids(skill.plus)]) for skill in SKILLS])  # (skill, pole, synonym)
_NOUN_IDS = _grid([nouns.split("|") for nouns, _ in DOMAINS.values()])  # (domain, 6, number)
_VERB_IDS = _grid([verbs.split("|") for _, verbs in DOMAINS.values()])  # (domain, 3, form)
_GREETING_IDS = _grid([list(row) for row in _GREETINGS])  # (formality, 4, 3)
_WEATHER_IDS = np.stack([ids(row) for row in _WEATHER])  # (weather, 4)
_BE_IDS = np.stack([ids(row) for row in _BE])  # (number, tense)


def draw_texts(rng: np.random.Generator, domain: Ints) -> tuple[Ints, Ints]:
    """Texts of the domains given by index (n,): token ids padded on the right (n, length), attributes (n, skills)."""
    n = len(domain)
    attributes = rng.integers(0, 2, (n, len(SKILLS)))
    attribute = dict(zip(SKILL_NAMES, attributes.T, strict=True))
    tense, number = attribute["tense"], attribute["number"]

    def one_of(table: Ints) -> Ints:
        return table[rng.integers(0, len(table), n)]

    def sometimes(column: Ints, share: float) -> Ints:
        return np.where(rng.random(n) < share, column, PAD)

    def always(word: str) -> Ints:
        return np.full(n, _ID[word])

    greeting = _GREETING_IDS[attribute["formality"], rng.integers(0, 4, n)]  # (n, 3)
    verb_form = np.where(tense == 1, 2, number)
    the, full_stop = always("the"), always(".")
    columns = [
        sometimes(greeting[:, 0], 0.6), greeting[:, 1], greeting[:, 2], always(","),
        the, one_of(ids(_ADJECTIVES)), _NOUN_IDS[domain, rng.integers(0, 6, n), number],
        _VERB_IDS[domain, rng.integers(0, 3, n), verb_form], always("near"), the, one_of(ids(_PLACES)),
        always("under"), the, _WEATHER_IDS[attribute["weather"], rng.integers(0, 4, n)], full_stop,
        one_of(ids(["i", "we"])), one_of(ids(["think", "say"])), the, _NOUN_IDS[domain, rng.integers(0, 6, n), number],
        _BE_IDS[number, tense], sometimes(one_of(ids(_ADVERBS)), 0.5), one_of(ids(_ADJECTIVES)), full_stop,
    ]  # fmt: skip
    return close_gaps(np.stack(columns, axis=1)), attributes


def close_gaps(token_ids: Ints) -> Ints:
    """The same rows with all padding moved to the right end."""
    return np.take_along_axis(token_ids, np.argsort(token_ids == PAD, axis=1, kind="stable"), axis=1)


@dataclass(frozen=True)
class Task:
    """A question about one skill in one domain.

    Its name is e.g. `phone-tense-plus`, with other label words than yes and no `phone-tense-plus.true-false`.
    """

    domain: str
    skill: str
    pole: Pole = "plus"
    label_words: tuple[str, str] = LABEL_PAIRS[0]
    """The affirming word first."""

    def __post_init__(self) -> None:
        if self.domain not in DOMAIN_NAMES or self.skill not in SKILL_NAMES or self.label_words not in LABEL_PAIRS:
            raise ValueError(f"no such task in the world of the lab: {self}")

    @property
    def name(self) -> str:
        labels = "" if self.label_words == LABEL_PAIRS[0] else "." + "-".join(self.label_words)
        return f"{self.domain}-{self.skill}-{self.pole}{labels}"

    @property
    def combination(self) -> tuple[int, int, int]:
        """Indices of domain, skill and label pair."""
        pair = LABEL_PAIRS.index(self.label_words)
        return DOMAIN_NAMES.index(self.domain), SKILL_NAMES.index(self.skill), pair


def task_named(name: str) -> Task:
    """The task of a name. Raises ValueError if the world has no such task."""
    match = re.fullmatch(r"([a-z]+)-([a-z]+)-(plus|minus)(?:\.([a-z]+)-([a-z]+))?", name)
    if match is None:
        raise ValueError(f"not the name of a task of the lab: {name!r}, expected e.g. 'phone-tense-plus'")
    domain, skill, pole, affirming, denying = match.groups()
    label_words = (affirming, denying) if affirming else LABEL_PAIRS[0]
    return Task(domain, skill, "plus" if pole == "plus" else "minus", label_words)


SOURCES = tuple(
    task_named(name)
    for name in (
        "movie-tense-plus", "hotel-tense-plus",
        "school-formality-plus", "music-formality-plus",
        "sport-number-plus", "travel-number-plus",
        "food-weather-plus", "phone-weather-plus",
        "music-tense-minus", "travel-formality-minus",
    )
)  # fmt: skip
"""The source tasks of the example; the last two conflict with plus targets of their skill."""

TARGETS = tuple(
    task_named(name)
    for name in (
        "phone-tense-plus", "food-formality-plus", "hotel-number-plus", "movie-weather-plus", "school-tense-minus",
    )
)  # fmt: skip
"""The target tasks of the example. Pre-training never sees their combinations of domain, skill and label words."""


def relatedness(a: Task, b: Task) -> Relatedness:
    """What is known about two tasks by construction: same skill and pole, opposite poles, or different skills."""
    if a.skill != b.skill:
        return "unrelated"
    return "related" if a.pole == b.pole else "conflicting"


def rows(task: Task, n: int, seed: int) -> list[dict[str, str]]:
    """`n` examples as `source` and `target` text.

    The texts depend on the domain, `n` and `seed` only: tasks of one domain ask about the same texts.
    """
    rng = np.random.default_rng([seed, zlib.crc32(task.domain.encode())])
    domain, skill, _ = task.combination
    texts, attributes = draw_texts(rng, np.full(n, domain))
    affirmed = attributes[:, skill] == (task.pole == "plus")
    labels = " ".join(task.label_words)
    return [
        {"source": f"{labels} {text_of(text)}", "target": task.label_words[0 if yes else 1]}
        for text, yes in zip(texts, affirmed, strict=True)
    ]
