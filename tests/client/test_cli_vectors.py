"""`tpv initialization` and `tpv vector`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tests.client.conftest import Run, line, sent

from tpv import files

PROMPT = np.ones((2, 3), np.float32)


def test_initializations_are_listed_and_shown(run: Run, registry: Any, wire: Any) -> None:
    registry.on("GET /initializations", wire.page(wire.initialization(), next_cursor="x"), wire.page())
    registry.on("GET /initializations/default/family", wire.initialization(parameters={"seed": 42}))
    assert [i["name"] for i in run("init", "list", "--json").json] == ["family"]
    assert run("init", "show", "family", "--json").json["fingerprint"] == wire.initialization()["fingerprint"]
    shown = run("init", "show", "family").out
    for text in ("t5-base at abc", "2 x 3", "seed=42"):
        assert text in shown
    assert "tpv init create" in run("init", "list").out  # none is there now


def test_an_initialization_is_uploaded_from_a_file(run: Run, registry: Any, wire: Any, tmp_path: Path) -> None:
    path = tmp_path / "prompt.safetensors"
    path.write_bytes(files.dump({"prompt": PROMPT}))
    registry.on("POST /initializations", wire.initialization())
    assert run("init", "create", "family", "--base-model", "m", "--unpinned", "--file", path, "--json").code == 0
    path.write_bytes(files.dump({"other": PROMPT}))
    assert "it has: other" in line(run("init", "create", "family", "--base-model", "m", "--file", path))


def test_an_initialization_is_drawn_by_a_worker(run: Run, registry: Any, wire: Any) -> None:
    start = wire.initialization()
    job = wire.job("queued", method="initialize")
    registry.on("POST /jobs", job)
    registry.on(
        f"GET /jobs/{job['id']}", wire.job("succeeded", method="initialize", result=start["id"], result_created=True)
    )
    registry.on(f"GET /jobs/{job['id']}/events", wire.events(finished=True))
    registry.on(f"GET /initializations/default/{start['id']}", start)
    shown = run("init", "create", "family", "--base-model", "m", "--num-virtual-tokens", 20, "--seed", 7, "--json")
    assert shown.json["created"] is True
    assert json.loads(registry.asked("POST /jobs")[0].content)["options"] == {"num_virtual_tokens": 20}
    shown = run("init", "create", "family", "--base-model", "m", "--no-wait")
    assert f"tpv job watch {job['id']}" in shown.out


def test_a_vector_is_registered(run: Run, registry: Any, wire: Any, tmp_path: Path) -> None:
    path = tmp_path / "prompt.safetensors"
    path.write_bytes(files.dump({"prompt": PROMPT}))
    registry.on("POST /vectors/default/mnli/versions", wire.version(), wire.version(created=False))
    metrics = '{"dataset": "d", "metric": "accuracy", "value": 0.5}'
    shown = run("vector", "register", "mnli", path, "-i", "family", "--task", "nli", "--tag", "team=a",
                "--metrics", metrics, "--hyperparameter", "lr=0.3", "--hyperparameter", "note=a b")  # fmt: skip
    assert shown.out.startswith("registered mnli:1  sha256:")
    body = registry.requests[-1].content
    assert b'"tags":{"team":"a"}' in body
    assert b'"hyperparameters":{"lr":0.3,"note":"a b"}' in body
    assert path.read_bytes() in body
    assert run("vector", "register", "mnli", path, "-i", "family").out.startswith("is there already: mnli:1")


def test_vectors_are_listed(run: Run, registry: Any, wire: Any) -> None:
    registry.on("GET /vectors", wire.page(wire.vector("a", aliases={"best": 1}, tags={"x": "[red]"}), wire.vector("b")))
    shown = run("vector", "list", "--task-type", "nli", "--tag", "team=a").out
    assert "best->1" in shown
    assert "x=[red]" in shown
    assert registry.requests[-1].url.params.multi_items() == [("task_type", "nli"), ("tag", "team:a")]
    assert [v["name"] for v in run("vector", "list", "--json", "--limit", 1).json] == ["a"]


def test_a_version_is_shown_with_its_figures(run: Run, registry: Any, wire: Any) -> None:
    version = wire.version(
        evaluations=[wire.evaluation(value=0.875)], parents=[{"reference": "default/qnli:2", "weight": 0.5}]
    )
    registry.on("GET /vectors/default/mnli/versions/@best", version)
    registry.on("GET /vectors/default/mnli", wire.vector(tags={"team": "a"}))
    registry.on("GET /vectors/default/mnli/versions", wire.page(version))
    shown = run("vector", "show", "mnli@best").out
    for text in ("mnli:1", "team=a", "0.875", "source qnli:2 x 0.5"):
        assert text in shown
    found = run("vector", "show", "mnli@best", "--json").json
    assert (found["version"], found["vector"]["tags"], found["versions"]) == (1, {"team": "a"}, [1])


def test_a_version_is_downloaded(run: Run, registry: Any, wire: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    content = files.dump({"vector": PROMPT})
    registry.on("GET /vectors/default/mnli/versions/newest", wire.version())
    registry.on("GET /vectors/default/mnli/versions/1/content", wire.content(content))
    assert run("vector", "download", "mnli").code == 0
    assert (tmp_path / "mnli-1.safetensors").read_bytes() == content
    assert run("vector", "download", "mnli", "T", "--json").json["path"] == "T"


def test_aliases_are_moved_removed_and_traced(run: Run, registry: Any, wire: Any) -> None:
    path = "/vectors/default/mnli/aliases/best"
    registry.on(f"PUT {path}", {"alias": "best", "version": 2}, wire.problem("alias-moved", 409, "it is at 3"))
    registry.on(f"DELETE {path}", wire.content(b""))
    move = {
        "alias": "best",
        "from_version": 1,
        "to_version": 2,
        "actor": "ann",
        "reason": "r",
        "at": "2026-01-01T00:00:00Z",
    }
    registry.on(f"GET {path}/history", [move])
    assert run("vector", "alias", "mnli", "best", 2, "--expect", 1).out == "mnli@best is mnli:2\n"
    assert line(run("vector", "alias", "mnli", "best", 4)).endswith("tpv vector alias NAME ALIAS --history")
    assert "ann" in run("vector", "alias", "mnli", "best", "--history").out
    assert run("vector", "alias", "mnli", "best", "--delete", "--json").json == {"alias": "best", "version": None}


def test_tags_are_set_and_removed_beside_the_others(run: Run, registry: Any, wire: Any) -> None:
    registry.on("GET /vectors/default/mnli", wire.vector(tags={"a": "1", "b": "2"}))
    registry.on("PATCH /vectors/default/mnli", wire.vector(tags={"b": "2", "c": "3"}))
    assert run("vector", "tag", "mnli", "c=3", "--remove", "a", "--json").json["tags"] == {"b": "2", "c": "3"}
    assert sent(registry) == {"tags": {"b": "2", "c": "3"}}
    run("vector", "tag", "mnli", "--description", "text")
    assert sent(registry) == {"description": "text"}
    run("vector", "tag", "mnli")
    assert registry.requests[-1].method == "GET"


def test_deleting_by_alias_says_which_version_went(run: Run, registry: Any, wire: Any) -> None:
    registry.on("GET /vectors/default/mnli/versions/@best", wire.version(version=3))
    registry.on("DELETE /vectors/default/mnli/versions/3", wire.problem("in-use", 409, "alias best points there"))
    registry.on("POST /vectors/default/mnli/versions/3/restore", wire.version(version=3))
    assert line(run("vector", "delete", "mnli@best")).endswith("delete it all the same with: --force")
    registry.on("DELETE /vectors/default/mnli/versions/3", wire.version(version=3))
    assert "tpv vector restore mnli:3" in run("vector", "delete", "mnli@best", "--force").out
    assert run("vector", "restore", "mnli:3").code == 0
