"""A registry that is not there: answers by path, counts what it is asked, in memory or on a loopback port."""

from __future__ import annotations

import hashlib
import json
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import settings

from tpv import files
from tpv.cli import main as cli

settings.register_profile("steady", deadline=None)  # the first example may load a library, and the machine may be busy
settings.load_profile("steady")

NOW = "2026-01-02T03:04:05Z"
Answer = httpx.Response | Exception
Handler = Callable[[httpx.Request], Answer]


@dataclass
class FakeRegistry:
    """Answers `METHOD /path` with what was put there; a list answers one after the other, its last item for ever."""

    routes: dict[str, Any] = field(default_factory=dict)
    requests: list[httpx.Request] = field(default_factory=list)

    def on(self, route: str, *answers: Answer | dict[str, Any] | list[Any] | Handler) -> None:
        method, _, path = route.partition(" ")
        self.routes[f"{method} {path if path.startswith('//') else '/api/v1' + path}"] = list(answers)

    def asked(self, route: str) -> list[httpx.Request]:
        method, _, path = route.partition(" ")
        return [r for r in self.requests if r.method == method and r.url.path == "/api/v1" + path]

    def handle(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answers = self.routes.get(f"{request.method} {request.url.path}")
        if answers is None:
            detail = f"there is nothing at {request.url.path}"
            return httpx.Response(404, json={"type": "urn:tpv:problem:not-found", "status": 404, "detail": detail})
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if callable(answer):
            answer = answer(request)
        if isinstance(answer, Exception):
            raise answer
        if not isinstance(answer, httpx.Response):
            return httpx.Response(200, json=answer)
        # A response is read once; the same answer may be given again.
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)

    @property
    def transport(self) -> httpx.MockTransport:
        return httpx.MockTransport(self.handle)


class Wire:
    """Answers as the service gives them, with defaults for all but what matters."""

    @staticmethod
    def problem(kind: str, status: int, detail: str = "so it is", **extra: Any) -> httpx.Response:
        document = {"type": f"urn:tpv:problem:{kind}", "title": kind, "status": status, "detail": detail, **extra}
        return httpx.Response(status, json=document, headers={"Content-Type": "application/problem+json"})

    @staticmethod
    def content(content: bytes) -> httpx.Response:
        return httpx.Response(200, content=content, headers={"ETag": f'"{files.digest(content)}"'})

    @staticmethod
    def id_of(text: str) -> str:
        return str(uuid.UUID(bytes=hashlib.sha256(text.encode()).digest()[:16], version=5))

    @staticmethod
    def page(*items: Any, next_cursor: str | None = None) -> dict[str, Any]:
        return {"items": list(items), "next_cursor": next_cursor}

    def initialization(self, name: str = "family", tensor: np.ndarray | None = None, **members: Any) -> dict[str, Any]:
        prompt = np.zeros((2, 3), np.float32) if tensor is None else tensor
        model = {"id": self.id_of("model"), "name": "t5-base", "revision": "abc", "unpinned": False, "verified": True,
                 "digest": None, "embedding_digest": None, "architecture": "T5", "token_dim": 3}  # fmt: skip
        return {
            "id": self.id_of(name), "namespace": "default", "name": name, "base_model": model, "num_virtual_tokens": 2,
            "token_dim": 3, "strategy": "imported", "parameters": {}, "fingerprint": files.fingerprint(prompt),
            "digest": files.digest(files.dump({"prompt": prompt})), "actor": "local", "created_at": NOW, **members,
        }  # fmt: skip

    def version(
        self, name: str = "mnli", version: int = 1, tensor: np.ndarray | None = None, **members: Any
    ) -> dict[str, Any]:
        vector = np.ones((2, 3), np.float32) if tensor is None else tensor
        content = files.dump({"vector": vector})
        start = self.initialization()
        summary = {
            key: start[key] for key in ("id", "namespace", "name", "fingerprint", "num_virtual_tokens", "token_dim")
        }
        return {
            "id": self.id_of(f"{name}:{version}"), "namespace": "default", "name": name, "version": version,
            "created": True, "fingerprint": files.fingerprint(vector), "prompt_fingerprint": files.fingerprint(vector),
            "reconstruction_error": 0.0, "initialization": {**summary, "base_model": "t5-base"},
            "digest": files.digest(content), "size": len(content), "norm": 1.0, "method": None, "hyperparameters": {},
            "dataset_fingerprint": None, "provenance": {}, "parents": [], "evaluations": [], "aliases": [], "job": None,
            "actor": "local", "created_at": NOW, "deleted_at": None, **members,
        }  # fmt: skip

    def vector(self, name: str = "mnli", **members: Any) -> dict[str, Any]:
        return {
            "id": self.id_of(name), "namespace": "default", "name": name, "tasks": [], "task_type": None,
            "description": None, "tags": {}, "aliases": {}, "base_models": ["t5-base"], "newest_version": 1,
            "actor": "local", "created_at": NOW, "deleted_at": None, **members,
        }  # fmt: skip

    def evaluation(self, split: str = "test", value: float = 0.5, **members: Any) -> dict[str, Any]:
        return {
            "id": self.id_of(f"{split} {value} {members}"), "dataset": "default/cr:1", "split": split,
            "metric": "accuracy", "value": value, "seed": 0, "n": 4, "job": None, "predictions": None,
            "created_at": NOW, **members,
        }  # fmt: skip

    def dataset(self, name: str = "cr", **splits: bytes) -> dict[str, Any]:
        described = [{"name": split, "rows": content.count(b"\n"), "fingerprint": files.digest(content),
                      "size": len(content)} for split, content in splits.items()]  # fmt: skip
        return {
            "id": self.id_of(name), "namespace": "default", "name": name, "version": 1, "created": True,
            "label_words": None,
            "metric": "accuracy", "description": None, "splits": described, "fingerprint": "sha256:" + "0" * 64,
            "actor": "local", "created_at": NOW,
        }  # fmt: skip

    def job(self, state: str = "queued", name: str = "job", **members: Any) -> dict[str, Any]:
        spec = {"method": "prompt-tuning", "options": {}, "output": "mnli", "base_model": {"id": "t5-base"}}
        return {
            "id": self.id_of(name), "method": "prompt-tuning", "state": state, "reason": None, "message": None,
            "spec": spec, "output": "mnli", "needs": [], "queue": "default", "priority": 0, "progress": {},
            "attempts": [], "result": "default/mnli:1" if state == "succeeded" else None, "result_created": None,
            "metrics": {}, "actor": "local", "created_at": NOW, "started_at": None, "finished_at": None, **members,
        }  # fmt: skip

    @staticmethod
    def events(*events: tuple[str, dict[str, Any]], after: int = 0, finished: bool = False) -> dict[str, Any]:
        items = [
            {"id": after + number, "attempt": 1, "type": kind, "at": NOW, "data": data}
            for number, (kind, data) in enumerate(events, 1)
        ]
        return {"items": items, "next_after": after + len(items), "finished": finished}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TPV_URL", "TPV_TOKEN", "TPV_DEBUG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def registry() -> FakeRegistry:
    return FakeRegistry()


@pytest.fixture
def wire() -> Wire:
    return Wire()


@pytest.fixture
def served(registry: FakeRegistry) -> Iterator[str]:
    """The fake registry on a loopback port; its URL."""

    class Bridge(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            answer = registry.handle(
                httpx.Request(self.command, url + self.path, headers=dict(self.headers), content=body)
            )
            self.send_response(answer.status_code)
            for name in ("content-type", "etag", "retry-after"):
                if name in answer.headers:
                    self.send_header(name, answer.headers[name])
            self.send_header("Content-Length", str(len(answer.content)))
            self.end_headers()
            self.wfile.write(answer.content)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer  # noqa: N815 # the names that http.server calls

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Bridge) as server:
        server.daemon_threads = True
        url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield url
        server.shutdown()


def parts(request: httpx.Request) -> tuple[dict[str, str], dict[str, bytes]]:
    """The form fields and the files of a multipart request."""
    boundary = request.headers["content-type"].partition("boundary=")[2].encode()
    fields, found = {}, {}
    for part in request.content.split(b"--" + boundary)[1:-1]:
        head, _, body = part[2:-2].partition(b"\r\n\r\n")
        name = head.decode().partition('name="')[2].partition('"')[0]
        if b"filename=" in head:
            found[name] = body
        else:
            fields[name] = body.decode()
    return fields, found


@dataclass
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Done]


@pytest.fixture
def run(served: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs one command against the fake registry."""
    monkeypatch.setenv("TPV_URL", served)
    monkeypatch.setenv("COLUMNS", "200")

    def command(*arguments: object) -> Done:
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        return Done(code, shown.out, shown.err)

    return command


def sent(registry: FakeRegistry) -> Any:
    """What the last request asked."""
    return json.loads(registry.requests[-1].content)


def line(done: Done) -> str:
    """The one line of an error."""
    assert (done.code, done.out) == (1, "")
    [text] = done.err.splitlines()
    return text


PEFT_CONFIG = {"peft_type": "PROMPT_TUNING", "task_type": "SEQ_2_SEQ_LM", "num_virtual_tokens": 2, "token_dim": 3}


def peft_directory(directory: Path, prompt: np.ndarray | None = None, **config: Any) -> Path:
    """A directory as PEFT writes one; by default for T5, so with as many dead rows as live ones."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps({**PEFT_CONFIG, **config}))
    tensor = np.arange(12, dtype=np.float32).reshape(4, 3) if prompt is None else prompt
    (directory / "adapter_model.safetensors").write_bytes(files.dump({"prompt_embeddings": tensor}, {"format": "pt"}))
    return directory
