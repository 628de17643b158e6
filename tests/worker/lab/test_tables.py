"""The lab's tables say what its figures say."""

from __future__ import annotations

import io

from rich.console import Console, RenderableType

from tpv_worker.lab import tables
from tpv_worker.lab.run import Figure, SeedFigures, TargetFigures

SOURCES = ("movie-tense-plus", "music-tense-minus", "food-weather-plus")
TARGET = "phone-tense-plus"


def figure(accuracy: float, group: list[str] | None = None) -> Figure:
    return Figure(accuracy=accuracy, target_steps=80, cpu_seconds=2.5, result=None, group=group)


def seed(number: int, plain: float, dtvg: float, group: list[str]) -> SeedFigures:
    return SeedFigures(
        seed=number,
        seconds=60.0,
        sources={name: figure(1.0) for name in SOURCES},
        similarity={"cosine": [[1.0, -0.2, 0.1], [-0.2, 1.0, 0.3], [0.1, 0.3, 1.0]]},
        targets={
            TARGET: TargetFigures(majority=0.5, methods={"prompt-tuning": figure(plain), "dtvg": figure(dtvg, group)})
        },
    )


def text(table: RenderableType) -> str:
    written = io.StringIO()
    Console(width=200, file=written).print(table)
    return written.getvalue()


SEEDS = [seed(0, 0.7, 0.9, ["movie-tense-plus"]), seed(1, 0.8, 1.0, ["movie-tense-plus", "music-tense-minus"])]


def line(table: RenderableType, word: str) -> str:
    [found] = [line for line in text(table).splitlines() if line.startswith(("│ " + word + " ", word))]
    return found


def test_a_target_has_a_line_a_method() -> None:
    assert "70.0%" in line(tables.of_target(SEEDS[:1], TARGET), "prompt-tuning")
    assert "movie-tense-plus" in line(tables.of_target(SEEDS[:1], TARGET), "dtvg")
    assert "50.0%" in line(tables.of_target(SEEDS[:1], TARGET), "majority")


def test_several_seeds_are_means_with_their_spread() -> None:
    found = line(tables.of_target(SEEDS, TARGET), "dtvg")

    assert "95.0% ± 7.1" in found
    assert "movie-tense-plus 2/2 =" in found
    assert "music-tense-minus 1/2 ≠" in found


def test_a_known_conflict_in_a_group_is_counted() -> None:
    assert "1 of 2 that could hold one" in line(tables.of_all(SEEDS), "dtvg")


def test_a_similarity_says_how_well_it_tells_related_pairs_from_others() -> None:
    said = tables.on_similarity(SEEDS, "cosine")

    assert "unrelated pairs 0.20" in said
    assert "conflicting pairs -0.20" in said
    assert "-0.20 ≠" in text(tables.of_similarity(SEEDS, "cosine"))
