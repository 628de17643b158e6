"""What README and docs say: their code runs, and what they name is there."""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest
import typer
from pydantic import BaseModel, SecretStr
from tests.client.conftest import FakeRegistry, Wire
from typer.testing import CliRunner

import tpv
import tpv.schemas
from tpv import files, methods
from tpv.cli import main as cli
from tpv_service.app import create_app
from tpv_service.settings import Settings

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
RECORDS = sorted((ROOT / "docs/decisions").glob("0*.md"))

#: Command lines that need other settings than the reader's own: `VARIABLE=value command ...`
ASSIGNMENT = re.compile(r"\w+=.*", re.DOTALL)
METHOD = {"--json": "POST", "--form": "POST", "-F": "POST"}


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    language: str
    text: str


def blocks(*languages: str, pages: list[Path] = PAGES) -> list[Block]:
    found = []
    for page in pages:
        for language, text in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE):
            if language in languages:
                found.append(Block(page, language, text))
    return found


def commands(program: str) -> Iterator[tuple[Path, list[str]]]:
    """The arguments of each call of a program in the shell blocks, and the page that it stands in."""
    for block in blocks("sh", ""):
        for line in lines(block.text):
            call: list[str] = []
            for word in [*line, ";"]:
                if not re.fullmatch(r"[;|&()]+", word):
                    call.append(word)
                    continue
                while call and (call[0] in ("do", "then", "export") or ASSIGNMENT.fullmatch(call[0])):
                    call.pop(0)
                if call and Path(call[0]).name == program:
                    yield block.page, call[1:]
                call = []


def lines(text: str) -> Iterator[list[str]]:
    """The words of each logical line; a quoted text or a backslash at the end goes on in the next one."""
    waiting = ""
    for line in text.splitlines():
        waiting += line.removesuffix("\\") + "\n"
        if line.endswith("\\"):
            continue
        try:
            reader = shlex.shlex(waiting, posix=True, punctuation_chars=";|&()")
            reader.whitespace_split = True
            words = list(reader)
        except ValueError:  # a quote is open
            continue
        yield words
        waiting = ""
    assert not waiting, waiting


def shown(page: Path) -> str:
    return str(page.relative_to(ROOT))


# --- Python -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: shown(block.page))
def test_python_compiles(block: Block) -> None:
    compile(block.text, str(block.page), "exec")


def test_the_readmes_python_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Against a registry that answers what is asked; each request is one that the service knows."""
    registry = answering()
    real = tpv.Client
    made: list[tpv.Client] = []

    def client(url: str) -> tpv.Client:
        made.append(real(url, transport=registry.transport))
        return made[-1]

    monkeypatch.setattr(tpv, "Client", client, raising=False)
    [block] = blocks("python", pages=[README])
    exec(compile(block.text, str(README), "exec"), {})  # noqa: S102 # our own

    assert capsys.readouterr().out == "default/phone-dtvg:1 0.75\n"
    assert registry.asked("POST /vectors/default/mine/versions")
    assert registry.asked("POST /groupings")
    for request in registry.requests:
        operation(request.method, request.url.path)
        if request.url.path.endswith("/jobs"):
            check_job(json.loads(request.content))
    for each in made:
        each.close()


def answering() -> FakeRegistry:
    """A registry with what the README's code asks for."""
    registry, wire = FakeRegistry(), Wire()
    start, vector = np.zeros((20, 64), np.float32), np.ones((20, 64), np.float32)
    fillers = wire.initialization("fillers-0", start, namespace="lab")
    summary = {key: fillers[key] for key in fillers if key not in ("base_model", "strategy", "parameters")}
    tense = wire.version("movie-tense-plus-0", 1, vector, namespace="lab")
    tense["initialization"] = {**summary, "base_model": "tpv-registry/lab-t5"}
    echo = {"rule": "so", "metric": "dot", "initialization": tense["initialization"], "size": 0}
    echo |= {"excluded": {}, "excluded_total": 0, "how": "so"}
    figures = {"target_similarity": 0.0, "knowledge_consistency": 0.0, "objective": 0.0, "strategy": "greedy"}
    done = wire.job("succeeded", result="default/phone-dtvg:1", metrics={"test/accuracy": 0.75})

    registry.on("GET /initializations/lab/fillers-0", fillers)
    registry.on(f"GET /initializations/lab/{fillers['id']}/content", wire.content(files.dump({"prompt": start})))
    registry.on("GET /vectors/lab/movie-tense-plus-0/versions/newest", tense)
    content = wire.content(files.dump({"vector": vector}))
    registry.on("GET /vectors/lab/movie-tense-plus-0/versions/1/content", content)
    registry.on("POST /vectors/default/mine/versions", wire.version("mine"))
    pool = {**echo, "exact": True}
    registry.on("POST /similarity/search", {"query": "default/mine:1", "hits": [], "pool": pool})
    registry.on(
        "POST /groupings", {"target": "t:1", "members": [], "trace": [], "trace_total": 0, "pool": pool, **figures}
    )
    registry.on("POST /jobs", wire.job())
    registry.on(f"GET /jobs/{done['id']}/events", wire.events(finished=True))
    registry.on(f"GET /jobs/{done['id']}", done)
    return registry


# --- REST -------------------------------------------------------------------------------------------------------------


@cache
def openapi() -> dict[str, Any]:
    settings = Settings(
        database_url=SecretStr("postgresql://nobody@localhost/nothing"),
        s3_endpoint="localhost:9",
        s3_access_key="nobody",
        s3_secret_key=SecretStr("nothing"),
    )
    return create_app(settings).openapi()  # no connection is made before it starts


def operation(method: str, path: str) -> dict[str, Any]:
    """What the service says of this request; fails when it knows none."""
    matching = {
        template: operations
        for template, operations in openapi()["paths"].items()
        if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", template), path)
    }
    assert matching, f"{path} is no path of the API"
    found = [operations[method.lower()] for operations in matching.values() if method.lower() in operations]
    assert found, f"{method} {path} is no call of the API"
    return dict(found[0])


def message(name: str) -> type[BaseModel]:
    """A message of the wire, by the name of its class."""
    for module in pkgutil.iter_modules(tpv.schemas.__path__):
        found = getattr(importlib.import_module(f"tpv.schemas.{module.name}"), name, None)
        if found is not None:
            return found  # type: ignore[no-any-return]
    raise AssertionError(f"there is no message {name}")


def check_job(body: dict[str, Any]) -> None:
    methods.options_of(body["method"], body["options"])


CURL = list(commands("curl"))


@pytest.mark.parametrize(("page", "arguments"), CURL, ids=[" ".join(words)[:60] for _, words in CURL])
def test_curl_calls_the_api(page: Path, arguments: list[str]) -> None:
    method = next((METHOD[word] for word in arguments if word in METHOD), "GET")
    [url] = [word for word in arguments if word.startswith(("$API", "http"))]
    parsed = httpx.URL(url.replace("$API", "http://localhost/api/v1"))
    called = operation(method, parsed.path)
    known = {parameter["name"] for parameter in called.get("parameters", ())}
    assert set(parsed.params) <= known
    if "--json" in arguments:
        body = json.loads(arguments[arguments.index("--json") + 1])
        schema = called["requestBody"]["content"]["application/json"]["schema"]
        message(schema["$ref"].rpartition("/")[2]).model_validate(body)
        if parsed.path.endswith("/jobs"):
            check_job(body)
    if method == "POST" and "--json" not in arguments:
        form = dict(arguments[i + 1].split("=", 1) for i, word in enumerate(arguments) if word == "--form")
        schema = called["requestBody"]["content"]["multipart/form-data"]["schema"]
        body_schema = openapi()["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        assert set(form) <= set(body_schema["properties"])
        assert set(body_schema["required"]) <= set(form)
        metadata = body_schema["properties"]["metadata"]["contentSchema"]["$ref"].rpartition("/")[2]
        message(metadata).model_validate_json(form["metadata"])


def test_the_readme_shows_every_step_by_curl() -> None:
    text = " ".join(word for page, words in CURL if page == README for word in words)
    assert all(step in text for step in ("--form", "/similarity/search", "/groupings", "/jobs"))


# --- The command line -------------------------------------------------------------------------------------------------

TPV = list(commands("tpv"))


@cache
def application() -> typer.Typer:
    return cli.build()


@cache
def help_of(*words: str) -> str:
    ran = CliRunner().invoke(application(), [*words, "--help"], env={"COLUMNS": "300", "TERM": "dumb"})
    assert ran.exit_code == 0, f"tpv {' '.join(words)}: {ran.output}"
    return ran.output


@pytest.mark.parametrize(("page", "arguments"), TPV, ids=[" ".join(words)[:60] for _, words in TPV])
def test_commands_and_their_options_are_there(page: Path, arguments: list[str]) -> None:
    words: list[str] = []
    for word in arguments:
        if not (re.fullmatch(r"[a-z]+", word) and re.search(rf"^│ {word}\s", help_of(*words), re.MULTILINE)):
            break
        words.append(word)
    assert words, f"tpv {arguments[0]} is no command"
    help_text = help_of(*words)
    assert "COMMAND [ARGS]" not in help_text, f"tpv {' '.join(words)} lacks a verb, or has another one than these"
    for option in [word for word in arguments if re.fullmatch(r"-\w|--[a-z-]+", word)]:
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", help_text), f"tpv {' '.join(words)} has no {option}"


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_commands_named_in_the_text_are_there(page: Path) -> None:
    """`tpv vector show`: each word of lower case leads to a command, or is an argument of one."""
    for found in re.findall(r"`tpv ([a-z][^`]*)`", without_what_is_missing(page.read_text())):
        words = found.split()
        help_of(words[0])
        if len(words) > 1 and "COMMAND [ARGS]" in help_of(words[0]):
            help_of(words[0], words[1])


def without_what_is_missing(text: str) -> str:
    """The README names what is not there yet, too."""
    return re.sub(r"^Not there yet:.*?\n\n", "", text, flags=re.DOTALL | re.MULTILINE)


# --- Names, paths and links -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, target


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_files_and_tests_named_are_there(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    ours = r"`((?:client|service|worker|migrations|tests|scripts|benchmarks|examples|docker|docs)/[^`\s]*)`"
    for name in re.findall(ours, text):
        path, _, test = name.partition("::")
        assert (ROOT / path).exists(), name
        assert not test or f"def {test}(" in (ROOT / path).read_text(), name
    for name in re.findall(r"`(tpv\.[A-Za-z_.]+)[`(]", text):
        assert resolved(name) is not None, name


def resolved(name: str) -> Any:
    """What a dotted name means; `tpv.Client.vectors.register` goes over an attribute that an instance has."""
    first, *rest = name.split(".")
    if rest and rest[0] in ("commands", "cli"):  # the group of entry points, and the command line
        return rest
    found: Any = importlib.import_module(first)
    for part in rest:
        if isinstance(found, type) and issubclass(found, tpv.Client | tpv.AsyncClient) and not hasattr(found, part):
            found = found("http://localhost", transport=httpx.MockTransport(lambda request: httpx.Response(404)))
        try:
            found = getattr(found, part)
        except AttributeError:
            found = importlib.import_module(f"{found.__name__}.{part}")
    return found


def test_decisions_have_one_form_and_are_listed() -> None:
    listed = re.findall(r"^(\d+)\. \[(.*)\]\((.*)\)$", (ROOT / "docs/decisions/README.md").read_text(), re.MULTILINE)
    titles = []
    for record in RECORDS:
        title, *headings = re.findall(r"^#+ (.*)$", record.read_text(), re.MULTILINE)
        assert headings == ["Context", "Decision", "Consequences", "Alternatives", "Files"], record.name
        number, _, text = title.partition(". ")
        titles.append((number, text, record.name))
    assert listed == titles


def test_every_file_of_the_packages_is_in_the_tour() -> None:
    """A new module or folder at the top of a package gets a line in docs/architecture.md."""
    text = (ROOT / "docs/architecture.md").read_text()
    packages = [ROOT / "client/tpv", ROOT / "service/tpv_service", ROOT / "worker/tpv_worker"]
    found = {shown(path) + ("/" if path.is_dir() else "") for package in packages for path in package.iterdir()}
    unnamed = {name for name in found if name.endswith(("/__init__.py", "/__main__.py", "/py.typed", "/__pycache__/"))}

    assert found - unnamed - set(re.findall(r"`([^`\s:]*)`", text)) == set()
