"""`tpv similarity`, `tpv group` and `tpv dataset`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.client.conftest import Run, sent


def pool(wire: Any, **excluded: str) -> dict[str, Any]:
    start = wire.initialization()
    summary = {key: start[key] for key in ("id", "namespace", "name", "fingerprint", "num_virtual_tokens", "token_dim")}
    return {"rule": "newest", "metric": "dot", "initialization": {**summary, "base_model": "m"}, "size": 2,
            "excluded": excluded, "excluded_total": len(excluded), "exact": True, "how": "so",
            "mixed_initializations": [], "reference_pool": None}  # fmt: skip


def test_a_search_says_what_it_looked_at(run: Run, registry: Any, wire: Any) -> None:
    hit = {"reference": "default/qnli:1", "similarity": 0.25, "tasks": ["qnli"], "task_type": "nli"}
    answer = {"query": "default/rte:1", "hits": [hit], "pool": pool(wire, **{"default/rte:1": "the query itself"})}
    registry.on("POST /similarity/search", answer)
    shown = run("similarity", "search", "rte", "-k", 3, "-c", "qnli", "-c", "mnli").out
    for text in ("qnli:1", "0.25", "among 2 vectors of initialization family", "rte:1 (the query itself)"):
        assert text in shown
    asked = {"query": "rte", "k": 3, "candidates": {"references": ["qnli", "mnli"]}}
    assert sent(registry) == asked | {"metric": "dot", "accuracy": "auto"}
    assert run("similarity", "search", "rte", "--versions", "alias:best", "--json").json == answer
    assert sent(registry)["candidates"] == {"versions": "alias:best"}

    answer["pool"]["reference_pool"] = {"rule": "the references given", "size": 32}
    shown = run("similarity", "search", "rte", "--metric", "dot-centered", "--reference", "a", "--reference", "b").out
    assert "less the mean of 32 (the references given)" in shown
    assert sent(registry)["reference_pool"] == {"references": ["a", "b"]}


def test_a_matrix_has_names_on_both_sides(run: Run, registry: Any, wire: Any) -> None:
    answer = {"references": ["default/a:1", "default/b:1"], "matrix": [[1, 0.5], [0.5, 2]], "metric": "dot",
              "order": [0, 1], "normalized": False,
              "initialization": pool(wire)["initialization"]}  # fmt: skip
    registry.on("POST /similarity/matrix", answer)
    *shown, said = run("similarity", "matrix", "a", "b").out.splitlines()
    assert [row.split() for row in shown] == [["dot", "a:1", "b:1"], ["a:1", "1", "0.5"], ["b:1", "0.5", "2"]]
    assert said == "2 vectors of initialization family"

    run("similarity", "matrix", "--task-type", "nli", "--initialization", "family")
    assert sent(registry) == {"filter": {"task_type": "nli", "initialization": "family"}, "metric": "dot"}

    answer |= {"normalized": True, "reference_pool": {"rule": "the references given", "size": 32},
               "mixed_initializations": [answer["initialization"] | {"name": "other"}]}  # fmt: skip
    options = ["--metric", "cosine-centered", "--reference", "c", "--normalize"]
    said = run("similarity", "matrix", "a", "b", *options).out.splitlines()[-1]
    assert said == (
        "2 vectors of initialization family and other, less the mean of 32 (the references given), mapped to 0 to 1"
    )
    assert sent(registry)["reference_pool"] == {"references": ["c"]}


def test_a_group_shows_every_decision(run: Run, registry: Any, wire: Any) -> None:
    trace = [
        {"reference": "default/a:1", "rank": 0, "similarity": 3, "consistency_before": 0, "consistency_after": 0,
         "taken": True, "reason": "taken"},
        {"reference": "default/b:1", "rank": 1, "similarity": -1, "consistency_before": 0, "consistency_after": 2,
         "taken": False, "reason": "negative-similarity"},
    ]  # fmt: skip
    answer = {"target": "default/t:1", "members": [{"reference": "default/a:1", "similarity": 3}],
              "target_similarity": 3, "knowledge_consistency": 0, "objective": 3, "strategy": "greedy",
              "trace": trace, "trace_total": len(trace), "pool": pool(wire)}  # fmt: skip
    registry.on("POST /groupings", answer)
    shown = run("group", "t", "a", "b", "--max-size", 2).out
    assert "negative-similarity" in shown
    assert "group for t:1: a:1\n" in shown
    candidates = {"references": ["a", "b"]}
    assert sent(registry) == {"target": "t", "candidates": candidates, "strategy": "greedy", "max_size": 2}
    assert run("group", "t", "--versions", "all", "--json").json["members"] == answer["members"]
    assert sent(registry)["candidates"] == {"versions": "all"}


def test_a_dataset_is_uploaded_and_listed(run: Run, registry: Any, wire: Any, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"source": "a", "target": "b"}\n')
    found = wire.dataset(train=path.read_bytes())
    registry.on("POST /datasets/default/cr/versions", found)
    registry.on("GET /datasets", wire.page(found))
    shown = run("dataset", "upload", "cr", "--train", path, "--label-word", "b", "--label-word", "c")
    assert shown.out == "uploaded cr:1 (train 1 rows)\n"
    assert b'"label_words":["b","c"]' in registry.requests[-1].content
    assert "train=1" in run("dataset", "list").out
