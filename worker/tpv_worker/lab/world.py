"""The small built-in world of the lab: a text grammar, eight skills, and the tasks made of them.

Every text carries one binary attribute per skill, drawn independently, so nothing in a text tells which skill is
asked about: only the prompt can. A task is a question about one attribute in one domain, answered with one pair of
label words. The minus pole of a skill asks the opposite question: such tasks conflict with the plus pole.

    source: yes no mate sup , at nightfall on tuesday surely the superb brown app vibrated near the street under the
            snow . emma say definitely the app was superb by dusk .
    target: yes                                           (task phone-tense-plus: "is it in the past tense?")

A source starts with its two label words, so that a task prompt vector need not encode them. The few training rows of a
target task are labelled carelessly: LABEL_NOISE of the answers are wrong.
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
    Skill(
        "place",
        "it happens indoors",
        plus=_words("inside indoors sheltered roofed"),
        minus=_words("outside outdoors open exterior"),
    ),
    Skill(
        "certainty",
        "the speaker is sure",
        plus=_words("sure confident doubtless proven"),
        minus=_words("unsure doubtful guessed tentative"),
    ),
    Skill(
        "time",
        "it happens by day",
        plus=_words("early daytime light awake"),
        minus=_words("late nightly dark asleep"),
    ),
    Skill(
        "sentiment",
        "the adjectives praise",
        plus=_words("favourable approving praising flattering"),
        minus=_words("unfavourable complaining critical insulting"),
    ),
)
"""In the order in which pre-training takes them up: those with several cues in a text are the easiest to start with."""

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

# What gives an attribute away. In every two-row table row 1 is the attribute holding and row 0 the opposite.
_GREETINGS = (
    ("hey dude yo", "hi buddy hey", "yo mate sup", "sup folks hi"),
    ("good evening sir", "dear madam hello", "esteemed colleague greetings", "kind regards madam"),
)
_BE = (("is", "was"), ("are", "were"))  # [number][tense]
_CUES = {
    "weather": (_words("rain storm snow hail"), _words("sun heat sunshine warmth")),
    "place": (_words("park beach street forest"), _words("kitchen hall office cellar")),
    "certainty": (_words("perhaps maybe possibly probably"), _words("surely certainly definitely clearly")),
    "time": (_words("night midnight dusk nightfall"), _words("dawn noon midday daybreak")),
    "sentiment": (_words("awful horrible nasty dismal"), _words("lovely great superb charming")),
}

# Words that say nothing about any attribute.
_COLOURS = _words("red green blue white black brown")
_DAYS = _words("monday tuesday wednesday thursday friday saturday sunday")
_PEOPLE = _words("anna ben clara david emma frank grace henry")
_ADVERBS = _words("really quite very")


def _vocabulary() -> tuple[str, ...]:
    words = [*SPECIAL, *FILLER, DESCRIBE]
    for pair in LABEL_PAIRS:
        words += pair
    for skill in SKILLS:
        words += [*skill.plus, *skill.minus]
    words += _words("the at on think say near under in by with , .")
    for nouns, verbs in DOMAINS.values():
        words += f"{nouns}|{verbs}".replace("|", " ").split()
    for table in (_GREETINGS, _BE, *_CUES.values()):
        words += " ".join(word for row in table for word in row).split()
    words += [*_COLOURS, *_DAYS, *_PEOPLE, *_ADVERBS]
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
_BE_IDS = np.stack([ids(row) for row in _BE])  # (number, tense)
_CUE_IDS = {skill: np.stack([ids(row) for row in table]) for skill, table in _CUES.items()}  # each (attribute, 4)

_GIVING_AWAY: list[tuple[Ints, Ints]] = [
    (_VERB_IDS[:, :, :2], _VERB_IDS[:, :, 2]),
    (_GREETING_IDS[0], _GREETING_IDS[1]),
    (_NOUN_IDS[:, :, 0], _NOUN_IDS[:, :, 1]),
    *((_CUE_IDS[name][0], _CUE_IDS[name][1]) for name in SKILL_NAMES[3:]),
]
GLOSSARY = tuple((np.unique(minus), np.unique(plus)) for minus, plus in _GIVING_AWAY)
"""[skill][attribute]: the ids of the words that give the attribute away by themselves."""


def draw_texts(rng: np.random.Generator, domain: Ints) -> tuple[Ints, Ints]:
    """Texts of the domains given by index (n,): token ids padded on the right (n, length), attributes (n, skills)."""
    n = len(domain)
    attributes = rng.integers(0, 2, (n, len(SKILLS)))
    attribute = dict(zip(SKILL_NAMES, attributes.T, strict=True))
    tense, number = attribute["tense"], attribute["number"]

    def always(word: str) -> Ints:
        return np.full(n, _ID[word])

    def one_of(words: tuple[str, ...]) -> Ints:
        return ids(words)[rng.integers(0, len(words), n)]

    def cue(skill: str) -> Ints:
        cues: Ints = _CUE_IDS[skill][attribute[skill], rng.integers(0, 4, n)]
        return cues

    def sometimes(share: float, *columns: Ints) -> list[Ints]:
        said = rng.random(n) < share
        return [np.where(said, column, PAD) for column in columns]

    def noun() -> Ints:
        nouns: Ints = _NOUN_IDS[domain, rng.integers(0, 6, n), number]
        return nouns

    greeting = _GREETING_IDS[attribute["formality"], rng.integers(0, 4, n)]  # (n, 3)
    verb = _VERB_IDS[domain, rng.integers(0, 3, n), np.where(tense == 1, 2, number)]
    the, comma, full_stop = always("the"), always(","), always(".")
    columns = [
        *sometimes(0.6, greeting[:, 0]), greeting[:, 1], greeting[:, 2], comma,
        always("at"), cue("time"), always("on"), one_of(_DAYS), cue("certainty"),
        the, *sometimes(0.8, cue("sentiment")), *sometimes(0.5, one_of(_COLOURS)), noun(), verb,
        always("near"), the, cue("place"), always("under"), the, cue("weather"), full_stop,
        one_of(_PEOPLE), one_of(("think", "say")), *sometimes(0.5, cue("certainty")),
        the, noun(), _BE_IDS[number, tense], *sometimes(0.5, one_of(_ADVERBS)), cue("sentiment"),
        *sometimes(0.5, always("in"), the, cue("place")), *sometimes(0.5, always("by"), cue("time")),
        *sometimes(0.5, always("with"), cue("weather")), full_stop,
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
            raise ValueError(f"no such task in the world of the lab: {self!r}")

    def __str__(self) -> str:
        return self.name

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
        "music-place-plus", "travel-place-plus",
        "school-certainty-plus", "sport-certainty-plus",
        "food-time-plus", "music-time-plus",
        "phone-sentiment-minus", "travel-sentiment-minus",
        "school-place-minus", "sport-time-minus", "food-sentiment-plus",
    )
)  # fmt: skip
"""The source tasks. Some ask the opposite of a target."""

TARGETS = tuple(
    task_named(name)
    for name in (
        "phone-tense-plus", "school-tense-minus", "food-formality-plus", "hotel-number-plus", "movie-weather-plus",
        "phone-place-plus", "movie-time-plus", "hotel-sentiment-minus",
    )
)  # fmt: skip
"""The target tasks. Pre-training never sees their combinations of domain, skill and label words."""

LABEL_NOISE = 0.2
"""The share of a target's training rows whose answer is wrong, as if a careless person had labelled them. Sources and
test rows have none. With right answers alone, 24 rows teach nearly every target by themselves: nothing would be left
for a transfer to add."""

FEW_SOURCES = tuple(task.name for task in SOURCES[:10])
FEW_TARGETS = ("phone-tense-plus", "school-tense-minus")
"""Names of the tasks that a run of two minutes takes."""


def _reference() -> tuple[Task, ...]:
    used = {(task.domain, task.skill) for task in (*SOURCES, *TARGETS)}
    tasks = []
    for turn in (0, 1):
        for number, skill in enumerate(SKILL_NAMES):
            free = [domain for domain in DOMAIN_NAMES if (domain, skill) not in used]
            domain = free[(number + turn) % len(free)]
            tasks += [Task(domain, skill, "plus"), Task(domain, skill, "minus")]
    return tuple(tasks)


REFERENCE = _reference()
"""32 more tasks, for centring: both poles of every skill, first in one domain and then in another. What their vectors
have in common is no single question. None is a source or a target, and no other task here has its domain and skill."""


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


def training_rows(task: Task, n: int, seed: int) -> list[dict[str, str]]:
    """The same, but of a target task LABEL_NOISE of the rows, drawn at random, have the wrong answer."""
    found = rows(task, n, seed)
    if task not in TARGETS:
        return found
    words = dict(zip(task.label_words, reversed(task.label_words), strict=True))
    wrong = np.random.default_rng([seed, zlib.crc32(task.name.encode())]).random(n) < LABEL_NOISE
    return [row | {"target": words[row["target"]]} if flip else row for row, flip in zip(found, wrong, strict=True)]
