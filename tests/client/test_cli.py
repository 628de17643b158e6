from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from tests.client.conftest import Run, line

from tpv import errors, files
from tpv.cli import main as cli
from tpv.cli.errors import HINTS, explain
from tpv.methods import METHODS, DtvgOptions

PROMPT = np.ones((2, 3), np.float32)


def sent(registry: Any) -> Any:
    return json.loads(registry.requests[-1].content)


# --- The frame -------------------------------------------------------------------------------------------------------


def test_help_lists_the_nouns(run: Run) -> None:
    shown = run("--help")
    assert shown.code == 0
    for noun in ("init", "vector", "similarity", "group", "dataset", "job"):
        assert f" {noun} " in shown.out
    assert "[namespace/]name" in run("vector", "show", "--help").out


def test_every_verb_has_help_and_json(run: Run) -> None:
    verbs = {
        "init": ["create", "list", "show"],
        "vector": ["register", "list", "show", "download", "alias", "tag", "delete", "restore"],
        "similarity": ["search", "matrix"],
        "dataset": ["upload", "list"],
        "job": ["tune", "transfer", "list", "show", "watch", "compare"],
        "import": ["peft", "pt"],
        "export": ["peft"],
    }
    for noun, names in verbs.items():
        for verb in names:
            shown = run(noun, verb, "--help")
            assert (shown.code, "--json" in shown.out) == (0, True), (noun, verb)
    assert "--json" in run("group", "--help").out


@pytest.mark.parametrize(
    "arguments",
    [
        ["vector", "fly"],
        ["vector", "show"],
        ["vector", "list", "--limit", "0"],
        ["vector", "tag", "mnli", "no-equals-sign"],
        ["vector", "alias", "mnli", "best"],
        ["vector", "alias", "mnli", "best", "2", "--history"],
        ["job", "list", "--state", "asleep"],
        ["job", "tune", "-d", "cr", "-i", "f", "--output", "o", "--option", "seed=3"],
        ["init", "create", "f", "--base-model", "m", "--file", "x", "--seed", "3"],
    ],
    ids=" ".join,
)
def test_a_command_line_that_makes_no_sense_is_status_2(
    run: Run, registry: Any, wire: Any, arguments: list[str]
) -> None:
    registry.on("GET /vectors/default/mnli", wire.vector())
    assert run(*arguments).code == 2


def test_the_version_is_printed(run: Run) -> None:
    assert run("--version").out.strip()


def test_url_and_token_come_before_the_noun(run: Run, registry: Any, wire: Any, served: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("TPV_URL", "http://127.0.0.1:9")
    registry.on("GET /vectors", wire.page())
    assert run("--url", served, "--token", "secret", "vector", "list", "--json").json == []
    assert registry.requests[0].headers["authorization"] == "Bearer secret"


# --- Errors ----------------------------------------------------------------------------------------------------------


def test_a_service_that_is_not_there_says_how_to_start_one(run: Run, monkeypatch: Any) -> None:
    shown = line(run("--url", "http://127.0.0.1:9", "vector", "list"))
    assert shown.startswith("tpv: could not reach http://127.0.0.1:9 (")
    assert shown.endswith("start a service with: tpv up")


def test_what_is_not_there_says_where_to_look(run: Run, registry: Any, wire: Any) -> None:
    registry.on("GET /vectors/default/mnli/versions/newest", wire.problem("not-found", 404, "there is no vector mnli"))
    assert line(run("vector", "show", "mnli")) == "tpv: there is no vector mnli; see: tpv vector list"
    told = "there is no vector mnli; see: tpv vector show x"
    registry.on("GET /vectors/default/mnli/versions/newest", wire.problem("not-found", 404, told))
    assert line(run("vector", "show", "mnli", "--json")) == f"tpv: {told}"


def test_a_reference_that_is_none_says_how_it_is_written(run: Run) -> None:
    assert "[namespace/]name" in line(run("vector", "show", "No Name"))


def test_a_file_that_is_not_there_is_named(run: Run, tmp_path: Path) -> None:
    shown = line(run("vector", "register", "mnli", tmp_path / "gone", "-i", "family"))
    assert shown == f"tpv: No such file or directory: {tmp_path / 'gone'}"


@pytest.mark.parametrize("kind", [*errors.PROBLEMS.values(), errors.ConnectionFailed, errors.WaitTimeout])
def test_every_error_is_one_line(kind: type[errors.TpvError]) -> None:
    shown = explain(kind("first\nsecond"))
    assert shown is not None
    assert shown.startswith("first second")
    assert any(issubclass(kind, known) for known, _ in HINTS)


def test_hints_name_commands_that_exist(run: Run) -> None:
    elsewhere = {"up", "admin"}  # of the service
    failed = errors.JobFailed("it did", type("Job", (), {"id": "x"})())
    for kind in (*errors.PROBLEMS.values(), errors.ConnectionFailed, errors.WaitTimeout):
        shown = explain(kind("text")) or ""
        if "tpv " in shown:
            noun, *rest = shown.partition("tpv ")[2].split()
            assert noun in elsewhere or noun == "--help" or run(noun, rest[0], "--help").code == 0, shown
    assert explain(failed) == "it did; see: tpv job show x"


def test_a_bug_keeps_its_traceback(run: Run, registry: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("tpv.cli.vector.connect", lambda context: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("vector", "list")


def test_the_traceback_is_shown_when_asked_for(run: Run, monkeypatch: Any) -> None:
    monkeypatch.setenv("TPV_DEBUG", "1")
    with pytest.raises(errors.NotFound):
        run("vector", "show", "mnli")


# --- Commands of other packages --------------------------------------------------------------------------------------


@dataclass
class Entry:
    name: str
    load: Callable[[], typer.Typer]


def added(monkeypatch: pytest.MonkeyPatch, *entries: Entry) -> None:
    monkeypatch.setattr(cli, "entry_points", lambda group: {"tpv.commands": entries}[group])


def test_other_packages_add_commands(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    app = typer.Typer()
    database = typer.Typer()
    app.command("up")(lambda: typer.echo("ready"))
    app.add_typer(database, name="db")
    database.command("upgrade")(lambda: typer.echo("upgraded"))
    database.command("downgrade")(lambda: typer.echo("downgraded"))
    added(monkeypatch, Entry("service", lambda: app))
    assert run("up").out == "ready\n"
    assert run("db", "upgrade").out == "upgraded\n"
    assert " up " in run("--help").out


def test_a_missing_extra_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> typer.Typer:
        raise ModuleNotFoundError("No module named 'sqlalchemy'", name="sqlalchemy")

    app = typer.Typer()
    app.command("worker")(missing)
    added(monkeypatch, Entry("service", missing), Entry("worker", lambda: app))
    for command in (["up", "--port", "0"], ["db", "upgrade"], ["worker"]):
        assert "pip install 'tpv-registry[lab]'" in line(run(*command))


# --- Initializations -------------------------------------------------------------------------------------------------


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


# --- Vectors ---------------------------------------------------------------------------------------------------------


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


# --- Similarity, groups, data sets -----------------------------------------------------------------------------------


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


# --- Jobs ------------------------------------------------------------------------------------------------------------


def ended(registry: Any, wire: Any, state: str = "succeeded", **members: Any) -> dict[str, Any]:
    """A job that is submitted and ends at once."""
    job = wire.job(state, **members)
    registry.on("POST /jobs", wire.job("queued"))
    registry.on(f"GET /jobs/{job['id']}", job)
    registry.on(f"GET /jobs/{job['id']}/events", wire.events(("log", {"message": "hello"}), finished=True))
    return job


TUNE = ["job", "tune", "--dataset", "cr", "-i", "family", "--output", "cr"]


def test_tuning_waits_and_shows_the_result(run: Run, registry: Any, wire: Any) -> None:
    ended(registry, wire, metrics={"validation/accuracy": 0.75})
    shown = run(
        *TUNE, "--shots", 64, "--steps", 10, "-o", "learning-rate=0.5", "-o", "separator=: ", "-o", "clip_norm=null"
    )
    assert (shown.code, shown.err) == (0, "")
    assert "validation/accuracy=0.75" in shown.out
    assert "mnli:1" in shown.out
    body = json.loads(registry.asked("POST /jobs")[0].content)
    assert body["shots"] == 64
    assert body["options"] == {"learning_rate": 0.5, "separator": ": ", "clip_norm": None, "steps": 10}
    assert run(*TUNE, "--json").json["state"] == "succeeded"


def test_without_waiting_it_says_how_to_watch(run: Run, registry: Any, wire: Any) -> None:
    registry.on("POST /jobs", wire.job("queued"))
    assert run(*TUNE, "--no-wait").out.endswith(f"watch it with: tpv job watch {wire.job()['id']}\n")
    assert run(*TUNE, "--no-wait", "--json").json["state"] == "queued"


def test_a_job_that_fails_is_status_1(run: Run, registry: Any, wire: Any) -> None:
    job = ended(registry, wire, "failed", reason="nan-loss", message="the loss was NaN")
    expected = f"tpv: job {job['id']} failed (nan-loss): the loss was NaN; see: tpv job show {job['id']}"
    assert line(run(*TUNE)) == expected


def test_a_transfer_waits_for_the_targets_own_tuning_too(run: Run, registry: Any, wire: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    first = wire.job("failed", "stage-1", message="out of memory")
    job = wire.job("failed", needs=[first["id"]], message="it needed another job")
    registry.on("POST /jobs", {**job, "state": "queued"})
    for each in (first, job):
        registry.on(f"GET /jobs/{each['id']}", each)
        registry.on(f"GET /jobs/{each['id']}/events", wire.events(finished=True))
    shown = run("job", "transfer", "-t", "cr", "-s", "sst2", "-s", "mr", "-d", "cr", "--output", "cr-dtvg",
                "--target-option", "steps=5")  # fmt: skip
    assert "out of memory" in line(shown)  # the cause, not its consequence
    body = json.loads(registry.asked("POST /jobs")[0].content)
    assert (body["method"], body["sources"], body["target_options"]) == ("dtvg", ["sst2", "mr"], {"steps": 5})


def test_a_job_may_read_several_data_sets_and_take_a_preset(run: Run, registry: Any, wire: Any) -> None:
    registry.on("POST /jobs", wire.job("queued"))
    assert run("job", "tune", "-d", "cr", "-d", "mr", "-i", "family", "--preset", "tpv-paper", "--output", "both",
               "--method", "spot-multitask", "--no-wait").code == 0  # fmt: skip
    assert run("job", "transfer", "--method", "tpv-sum", "-s", "sst2", "-d", "cr", "--output", "new", "--steps", 0,
               "--reference", "a", "--reference", "b", "--no-wait").code == 0  # fmt: skip
    tuning, transfer = [json.loads(request.content) for request in registry.asked("POST /jobs")]
    assert (tuning["dataset"], tuning["datasets"], tuning["preset"]) == ("cr", ["mr"], "tpv-paper")
    assert (transfer["options"], transfer["reference_pool"]["references"]) == ({"steps": 0}, ["a", "b"])
    assert transfer.keys() & {"target", "datasets", "preset"} == set()


def test_methods_and_their_options_are_listed(run: Run) -> None:
    found = {entry["method"]: entry for entry in run("job", "methods", "--json").json}
    assert list(found) == list(METHODS)
    assert (found["mpt"]["gives"], found["mpt"]["takes"]) == ("vector", "sources, a data set of each source")
    assert "Lester et al. 2021" in run("job", "methods").out
    options = {option["option"]: option for option in run("job", "methods", "dtvg", "--json").json}
    assert options.keys() == DtvgOptions.model_fields.keys()
    assert options["regroup_every"]["default"] == 1
    assert all(option["what"] for option in options.values())
    assert "Steps between two groupings" in run("job", "methods", "dtvg").out
    assert run("job", "methods", "dtv").code == 2


def test_an_artifact_is_saved(run: Run, registry: Any, wire: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    content = files.dump({"A": np.ones((2, 2), np.float32)})
    artifact = {"digest": files.digest(content), "size": len(content)}
    job = wire.job("succeeded", method="lora", output=None, result=None, artifact=artifact)
    plain = wire.job("succeeded", "plain")
    for each in (job, plain):
        registry.on(f"GET /jobs/{each['id']}", each)
    registry.on(f"GET /jobs/{job['id']}/artifact", wire.content(content))
    assert f"tpv job download {job['id']}" in run("job", "show", job["id"]).out
    assert run("job", "download", job["id"]).out == f"saved to lora-{job['id']}.safetensors\n"
    assert Path(f"lora-{job['id']}.safetensors").read_bytes() == content
    assert run("job", "download", job["id"], "other", "--json").json["artifact"] == artifact
    assert "has no artifact" in line(run("job", "download", plain["id"]))


def test_jobs_are_listed_and_shown(run: Run, registry: Any, wire: Any) -> None:
    job = wire.job("running", progress={"step": 3, "steps": 8, "loss": 0.5})
    registry.on("GET /jobs", wire.page(job))
    registry.on(f"GET /jobs/{job['id']}", job)
    assert "3/8" in run("job", "list", "--state", "running").out
    assert registry.requests[-1].url.params["state"] == "running"
    assert "running" in run("job", "show", job["id"]).out
    assert run("job", "show", job["id"], "--json").json["progress"]["step"] == 3


def test_watching_prints_the_events(run: Run, registry: Any, wire: Any) -> None:
    job = ended(registry, wire)
    shown = run("job", "watch", job["id"])
    assert "log: message=hello" in shown.out
    assert "succeeded: mnli:1" in shown.out
    [event] = map(json.loads, run("job", "watch", job["id"], "--json").out.splitlines())
    assert (event["job"], event["data"]) == (job["id"], {"message": "hello"})


@pytest.fixture
def heard() -> Iterator[None]:
    """Ctrl-C reaches children, also when the tests run as a shell's background job, which ignores it and its own do."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
def test_ctrl_c_leaves_the_job_running(registry: Any, wire: Any, served: str) -> None:
    job = wire.job("running")
    registry.on(f"GET /jobs/{job['id']}", job)

    def slow(request: Any) -> Any:
        time.sleep(0.2)
        return wire.content(json.dumps(wire.events()).encode())

    registry.on(f"GET /jobs/{job['id']}/events", slow)
    command = [sys.executable, "-m", "tpv.cli.main", "--url", served, "job", "watch", job["id"], job["id"]]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"COLUMNS": "200"}) as process:
        while not registry.asked(f"GET /jobs/{job['id']}/events"):
            time.sleep(0.02)
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, shown = process.communicate(timeout=20)
    assert process.returncode == 130
    assert f"tpv job watch {job['id']}" in shown
    assert "Traceback" not in shown


# --- Comparing -------------------------------------------------------------------------------------------------------


def reached(registry: Any, wire: Any, name: str, answers: str, targets: str, *, target: str | None = None) -> str:
    """A finished job whose result was evaluated on the test split of cr; its id."""
    rows = [{"prediction": a, "target": t} for a, t in zip(answers, targets, strict=True)]
    content = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    value = sum(a == t for a, t in zip(answers, targets, strict=True)) / len(targets)
    job = wire.job("succeeded", name, result=f"default/{name}:1", metrics={"target_steps": 10, "cpu_seconds": 2.5})
    if target:
        pinned = {"reference": f"default/{target}:1", "version_id": wire.id_of(target), "fingerprint": "sha256:0"}
        job["spec"] = {**job["spec"], "target": pinned}
    test = wire.evaluation(value=value, job=job["id"], predictions=files.digest(content), id=wire.id_of(name + "test"))
    validation = wire.evaluation("validation", 0.99, job=job["id"], id=wire.id_of(name + "validation"))
    version = wire.version(name, job=job["id"], method="prompt-tuning", evaluations=[validation, test])
    registry.on(f"GET /jobs/{job['id']}", job)
    registry.on(f"GET /vectors/default/{name}/versions/1", version)
    registry.on(f"GET /vectors/default/{name}/versions/newest", version)
    registry.on(f"GET /evaluations/{test['id']}/predictions", wire.content(content))
    return str(job["id"])


@pytest.fixture
def compared(registry: Any, wire: Any) -> tuple[str, str]:
    train = b'{"source": "x", "target": "b"}\n' * 2 + b'{"source": "x", "target": "a"}\n'
    registry.on("GET /datasets/default/cr/versions/1", wire.dataset(train=train))
    registry.on("GET /datasets/default/cr/versions/1/splits/train", wire.content(train))
    targets = "aabb" * 10
    tuned = reached(registry, wire, "cr", "abab" * 10, targets)
    return tuned, reached(registry, wire, "cr-dtvg", "aabb" * 5 + "aaab" * 5, targets, target="cr")


def test_jobs_are_compared_on_the_test_split(run: Run, compared: tuple[str, str]) -> None:
    tuned, _ = compared
    found = run("job", "compare", tuned, "cr-dtvg", "--paired", tuned, "--json").json
    assert found["majority"] == 0.5  # b, as in training
    first, second = found["results"]
    assert (first["value"], first["split"], first["target_steps"], first["difference"]) == (0.5, "test", 10, None)
    assert (second["value"], second["target_steps"], second["cpu_seconds"]) == (0.875, 20, 5.0)  # both stages
    difference = second["difference"]
    assert difference["difference"] == pytest.approx(0.375)
    assert 0 < difference["low"] < 0.375 < difference["high"]
    shown = run("job", "compare", tuned, "cr-dtvg", "--paired", "cr").out
    assert "majority class" in shown
    assert "minus cr:1 (95 %)" in shown
    assert f"+0.3750 [{difference['low']:+.4f}" in shown


def test_a_comparison_without_a_base_has_no_differences(run: Run, compared: tuple[str, str]) -> None:
    shown = run("job", "compare", *compared).out.splitlines()
    assert shown[0].split()[-3:] == ["steps", "CPU", "s"]
    assert len(shown) == 4


def test_jobs_without_a_vector_are_compared_by_their_own_figures(
    run: Run, registry: Any, wire: Any, compared: tuple[str, str]
) -> None:
    content = (b'{"prediction": "a", "target": "a"}\n' * 2 + b'{"prediction": "b", "target": "b"}\n' * 2) * 10
    job = wire.job("succeeded", "lora", method="lora", output=None, result=None, metrics={"target_steps": 3})
    pinned = {"reference": "default/cr:1", "dataset_id": wire.id_of("cr"), "fingerprint": "sha256:0"}
    own = {"job": job["id"], "predictions": files.digest(content)}
    figures = [wire.evaluation(value=1.0, **own), wire.evaluation(value=0.1, dataset="default/mr:1", **own)]
    job |= {"spec": {**job["spec"], "dataset": pinned}, "evaluations": figures[::-1]}
    registry.on(f"GET /jobs/{job['id']}", job)
    registry.on(f"GET /evaluations/{figures[0]['id']}/predictions", wire.content(content))
    found = run("job", "compare", job["id"], compared[0], "--paired", compared[0], "--json").json["results"][0]

    assert (found["reference"], found["job"], found["method"]) == (None, job["id"], "lora")
    assert (found["value"], found["target_steps"], found["difference"]["difference"]) == (1.0, 3, 0.5)
    assert f"job {job['id']}" in run("job", "compare", job["id"]).out


def test_what_cannot_be_compared_says_why(run: Run, registry: Any, wire: Any, compared: tuple[str, str]) -> None:
    other = reached(registry, wire, "trec", "aa", "aa")
    assert run("job", "compare", compared[0], "--paired", other).code == 2
    running = wire.job("running", "running")
    registry.on(f"GET /jobs/{running['id']}", running)
    assert line(run("job", "compare", running["id"])).endswith(f"see: tpv job show {running['id']}")
    registry.on("GET /vectors/default/bare/versions/newest", wire.version("bare"))
    assert "no evaluation" in line(run("job", "compare", "bare"))
