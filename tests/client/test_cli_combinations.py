"""`tpv combine`, and what `tpv vector` has for searching, prompts and lineage."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from tests.client.conftest import Run, Wire, sent

from tpv import files


def combination(wire: Wire, **members: Any) -> dict[str, Any]:
    terms = [
        {"reference": "default/mnli:1", "fingerprint": "sha256:a", "weight": 1.0, "cosine": 0.75},
        {"reference": "default/rte:2", "fingerprint": "sha256:b", "weight": -0.5, "cosine": None},
    ]
    return {**wire.version("out"), "terms": terms, **members}


def test_combine_sends_terms_and_shows_them(run: Run, registry: Any, wire: Wire) -> None:
    registry.on("POST /combinations", combination(wire))
    done = run("combine", "out", "mnli=1", "rte@best=-0.5", "--method", "ties", "--density", "0.2", "--tag", "a=b")

    assert done.code == 0, done.err
    assert sent(registry) == {
        "name": "default/out",
        "terms": [{"vector": "mnli", "weight": 1.0}, {"vector": "rte@best", "weight": -0.5}],
        "method": "ties",
        "density": 0.2,
        "tags": {"a": "b"},
    }
    assert done.out.startswith("registered out:1  sha256:")
    assert [row.split() for row in done.out.splitlines()[2:]] == [["1", "mnli:1", "0.75"], ["-0.5", "rte:2"]]
    assert registry.requests[-1].headers["idempotency-key"]


def test_combine_says_when_initializations_are_mixed(run: Run, registry: Any, wire: Wire) -> None:
    other = {**wire.version()["initialization"], "name": "other"}
    registry.on("POST /combinations", combination(wire, mixed_initializations=[other]))
    done = run("combine", "out", "mnli=1", "rte=1", "--allow-mixed-initializations", "-i", "family")

    assert sent(registry)["allow_mixed_initializations"] is True
    assert sent(registry)["initialization"] == "family"
    assert "the result belongs to family; there are terms of other" in done.out


def test_combine_prints_json(run: Run, registry: Any, wire: Wire) -> None:
    registry.on("POST /combinations", combination(wire))

    assert run("combine", "out", "mnli=1", "rte=1", "--json").json["terms"][0]["cosine"] == 0.75


@pytest.mark.parametrize("term", ["mnli", "mnli=", "mnli=x", "=="])
def test_a_term_is_a_vector_and_a_weight(run: Run, term: str) -> None:
    done = run("combine", "out", term)

    assert done.code == 2
    assert "VECTOR=WEIGHT" in done.err


@pytest.mark.parametrize(
    "arguments", [("out:3", "mnli=1"), ("out", "mnli=nan"), ("out", "mnli=1", "--method", "ties")], ids=str
)
def test_what_cannot_be_combined_is_one_line(run: Run, registry: Any, arguments: tuple[str, ...]) -> None:
    done = run("combine", *arguments)

    assert done.code == 1
    assert done.err.startswith("tpv: ")
    assert not registry.requests


def test_search_sends_every_condition(run: Run, registry: Any, wire: Wire) -> None:
    registry.on("POST /vectors/search", wire.page(wire.version("mnli", aliases=["best"])))
    done = run(
        *("vector", "search", "--name", "mnli", "--task", "t", "--tag", "team=x", "--alias", "best"),
        *("--at-least", "test/accuracy=0.8", "--at-most", "catalog:glue/rte/test/loss=1", "--at-least", "f1=0"),
        *("--filter", '{"not": {"method": "dtvg"}}', "--sort", "-default/cr:1/test/accuracy", "--sort", "name"),
        *("--versions", "all", "--created-after", "2026-01-02", "--limit", "7"),
    )

    assert done.code == 0, done.err
    asked = sent(registry)
    after = asked["filter"].pop("created_after")
    assert after.startswith("2026-01-0")
    assert after[-1] == "Z" or after[-6] in "+-"
    assert asked == {
        "filter": {
            "names": ["default/mnli"],
            "task": "t",
            "tags": {"team": "x"},
            "alias": "best",
            "metrics": [
                {"metric": "accuracy", "split": "test", "dataset": None, "at_least": 0.8},
                {"metric": "f1", "split": None, "dataset": None, "at_least": 0.0},
                {"metric": "loss", "split": "test", "dataset": "catalog:glue/rte", "at_most": 1.0},
            ],
            "all": [{"not": {"method": "dtvg"}}],
        },
        "versions": "all",
        "sort": [
            {"by": {"dataset": "default/cr:1", "split": "test", "metric": "accuracy"}, "descending": True},
            {"by": "name", "descending": False},
        ],
        "limit": 7,
    }
    assert "mnli:1" in done.out
    assert "best" in done.out


def test_search_reads_page_after_page_as_far_as_asked(run: Run, registry: Any, wire: Wire) -> None:
    first = wire.page(wire.version("a"), wire.version("b"), next_cursor="x")
    registry.on("POST /vectors/search", first, wire.page(wire.version("c"), next_cursor="y"))
    found = run("vector", "search", "--limit", "3", "--json").json

    assert [version["name"] for version in found] == ["a", "b", "c"]
    assert sent(registry)["cursor"] == "x"
    assert len(registry.requests) == 2


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--filter", "{"), 2),
        (("--at-least", "accuracy"), 2),
        (("--filter", "[1]"), 1),
        (("--filter", '{"nmae": 1}'), 1),
        (("--sort", "size"), 1),
        (("--versions", "oldest"), 1),
    ],
)
def test_a_search_that_makes_no_sense_is_not_sent(
    run: Run, registry: Any, arguments: tuple[str, ...], code: int
) -> None:
    assert run("vector", "search", *arguments).code == code
    assert not registry.requests


def test_a_filter_may_be_in_a_file(run: Run, registry: Any, wire: Wire, tmp_path: Path) -> None:
    registry.on("POST /vectors/search", wire.page())
    path = tmp_path / "filter.json"
    path.write_text('{"any": [{"task": "a"}, {"task": "b"}]}')
    done = run("vector", "search", "--filter", f"@{path}")

    assert sent(registry)["filter"] == {"any": [{"task": "a"}, {"task": "b"}]}
    assert "no version passes" in done.out


def test_prompt_saves_what_came(run: Run, registry: Any, tmp_path: Path) -> None:
    said = {"vector": "default/mnli:1", "vector_fingerprint": "sha256:a", "initialization": "sha256:b", "scale": "0.5"}
    content = files.dump({"prompt": np.ones((2, 3), np.float32)}, said)
    etag = {"ETag": f'"{files.digest(content)}"'}
    registry.on("GET /vectors/default/mnli/versions/newest/prompt", httpx.Response(200, content=content, headers=etag))
    path = tmp_path / "p.safetensors"
    done = run("vector", "prompt", "mnli", path, "--scale", "0.5", "-i", "other", "--allow-mixed-initializations")

    asked = dict(registry.requests[-1].url.params)
    assert asked == {"initialization": "other", "scale": "0.5", "allow_mixed_initializations": "true"}
    assert path.read_bytes() == content
    assert done.out == f"saved mnli:1 with scale 0.5 on sha256:b to {path}: 2 x 3\n"


def test_lineage_prints_both_directions_as_trees(run: Run, registry: Any) -> None:
    def node(name: str, **members: Any) -> dict[str, Any]:
        known = {"fingerprint": "sha256:0", "method": None, "job": None, "deleted": False}
        return {"reference": f"default/{name}:1", **known, **members}

    def edge(parent: str, child: str, weight: float | None = None) -> dict[str, Any]:
        names = {"parent": f"default/{parent}:1", "child": f"default/{child}:1"}
        return {**names, "role": "source", "weight": weight}

    lineage = {
        "reference": "default/d:1",
        "nodes": [node("a", method="prompt-tuning"), *map(node, "bcdx"), node("e", deleted=True)],
        "edges": [edge("x", "a"), edge("a", "b"), edge("a", "c"), edge("b", "d", 0.5), edge("c", "d"), edge("d", "e")],
        "truncated": True,
    }
    registry.on("GET /vectors/default/d/versions/newest/lineage", lineage)

    assert run("vector", "lineage", "d", "--json").json == lineage
    assert run("vector", "lineage", "d").out.splitlines() == [
        "d:1",
        "made from",
        "├── source x 0.5 b:1",
        "│   └── source a:1 prompt-tuning",
        "│       └── source x:1",
        "└── source c:1",
        "    └── source a:1 prompt-tuning (see above)",
        "made into",
        "└── source e:1 (deleted)",
        "there is more; the nearest are shown",
    ]


def test_a_lineage_of_hundreds_of_steps_is_printed(run: Run, registry: Any) -> None:
    names = [f"default/v{i}:1" for i in range(900)]
    known = {"fingerprint": "sha256:0", "method": None, "job": None, "deleted": False}
    edges = [{"parent": parent, "child": child, "role": "source", "weight": None} for parent, child in pairwise(names)]
    nodes = [{"reference": name, **known} for name in names]
    lineage = {"reference": names[-1], "nodes": nodes, "edges": edges, "truncated": False}
    registry.on("GET /vectors/default/v899/versions/newest/lineage", lineage)
    done = run("vector", "lineage", "v899")

    assert done.code == 0, done.err
    assert len(done.out.splitlines()) == 901
