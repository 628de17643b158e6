"""The frame of the command line: help, errors, and commands of other packages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from tests.client.conftest import Run, line

from tpv import errors
from tpv.cli import main as cli
from tpv.cli.errors import HINTS, explain


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
