from __future__ import annotations

import numpy as np
import pytest

from tpv.comparison import correct, majority, paired_bootstrap


def rows(answers: str, targets: str) -> list[dict[str, str]]:
    return [{"prediction": answer, "target": target} for answer, target in zip(answers, targets, strict=True)]


def test_white_space_around_an_answer_does_not_matter() -> None:
    found = correct([{"prediction": " yes", "target": "yes\n"}, {"prediction": "y", "target": "yes"}])
    assert found.tolist() == [True, False]


def test_the_majority_class_is_the_most_frequent_answer_of_the_training_rows() -> None:
    assert majority(["a", "b", "b "], ["a", "b", "b", "c"]) == 0.5
    assert majority(["b", "a"], ["a", "b", "b", "b"]) == 0.75  # the first one on ties


def test_a_method_against_itself_differs_by_nothing() -> None:
    same = rows("abab", "abba")
    found = paired_bootstrap(same, same)
    assert (found.difference, found.low, found.high) == (0, 0, 0)


def test_always_better_is_certain() -> None:
    found = paired_bootstrap(rows("aaaa", "aaaa"), rows("bbbb", "aaaa"))
    assert (found.difference, found.low, found.high) == (1, 1, 1)


def test_the_same_seed_gives_the_same_interval() -> None:
    one, base = rows("aabb" * 10, "abab" * 10), rows("abbb" * 10, "abab" * 10)
    assert paired_bootstrap(one, base) == paired_bootstrap(one, base)
    assert paired_bootstrap(one, base) != paired_bootstrap(one, base, seed=1)


def test_the_interval_is_the_normal_one_when_rows_are_many() -> None:
    draw = np.random.default_rng(0)
    targets = "".join(draw.choice(list("ab"), 4000))
    one, base = "".join(draw.choice(list("ab"), 4000)), "".join(draw.choice(list("ab"), 4000))
    found = paired_bootstrap(rows(one, targets), rows(base, targets))
    gain = correct(rows(one, targets)).astype(float) - correct(rows(base, targets))
    half = 1.96 * gain.std() / 4000**0.5
    assert found.difference == pytest.approx(gain.mean())
    assert found.low == pytest.approx(gain.mean() - half, abs=0.002)
    assert found.high == pytest.approx(gain.mean() + half, abs=0.002)


def test_pairing_narrows_what_both_find_easy() -> None:
    """Two methods that agree on most rows differ surely, although each alone is uncertain."""
    targets = "a" * 100
    found = paired_bootstrap(rows("a" * 60 + "b" * 40, targets), rows("a" * 50 + "b" * 50, targets))
    assert found.low > 0.03
    assert found.high < 0.17


def test_other_rows_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="different rows"):
        paired_bootstrap(rows("ab", "ab"), rows("ab", "aa"))
    with pytest.raises(ValueError, match="no predictions"):
        paired_bootstrap([], [])
