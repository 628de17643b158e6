from __future__ import annotations

import json

import pytest

from tpv.errors import PROBLEMS, Conflict, Invalid, NotFound, ProblemError, Unavailable, from_problem


@pytest.mark.parametrize("kind", PROBLEMS.values(), ids=PROBLEMS)
def test_every_problem_comes_back_as_itself(kind: type[ProblemError]) -> None:
    sent = kind("what is wrong", differences={"shape": [[1, 2], [3, 4]]}, reference="default/mnli:3")
    document = json.loads(json.dumps(sent.problem()))
    got = from_problem(document, document["status"])
    assert type(got) is kind
    assert (got.detail, str(got), got.extra) == (sent.detail, "what is wrong", sent.extra)
    assert got.problem() == document


def test_types_are_unique_and_every_class_is_listed() -> None:
    def below(kind: type[ProblemError]) -> list[type[ProblemError]]:
        return [kind, *(found for sub in kind.__subclasses__() for found in below(sub))]

    assert sorted(PROBLEMS) == sorted(kind.type for kind in below(ProblemError))


def test_a_problem_without_a_detail_has_its_title() -> None:
    assert str(NotFound()) == NotFound.title


@pytest.mark.parametrize(
    ("status", "kind"), [(404, NotFound), (409, Conflict), (422, Invalid), (503, Unavailable), (418, ProblemError)]
)
def test_a_problem_of_an_unknown_type_is_known_by_its_status(status: int, kind: type[ProblemError]) -> None:
    error = from_problem({"type": "about:blank", "title": "Something"}, status)
    assert type(error) is kind
    assert (error.status, error.detail) == (status, "Something")
