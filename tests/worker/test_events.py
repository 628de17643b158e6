"""What an attempt tells while it works, and what comes of it where it is refused."""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import warnings
from typing import Any
from uuid import uuid4

import httpx
import pytest
from tests.worker.registry import Answer, problem, registry

from tpv import Client
from tpv.errors import ProblemError, Unavailable
from tpv.schemas.initializations import BaseModelReference
from tpv.schemas.jobs import AttemptStarted, JobSpec
from tpv_worker.attempt import run_attempt
from tpv_worker.base_model import LoadedModel
from tpv_worker.errors import DataError
from tpv_worker.events import Events
from tpv_worker.settings import Settings

forks = multiprocessing.get_context("fork")
MODEL = BaseModelReference.model_construct(id="a model")
SPEC = JobSpec.model_construct(method="initialize", options={}, output=None, base_model=MODEL)
STARTED = AttemptStarted.model_construct(job=uuid4(), number=1, spec=SPEC, checkpoints=[])


@pytest.fixture(autouse=True)
def _sent_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread sends what a test is about to send, or to look at."""
    monkeypatch.setattr("tpv_worker.events.SEND_EVERY", 3600.0)


class Says(LoadedModel):
    """A model whose loading has something to say, and goes wrong."""

    def __init__(self, *lines: str) -> None:
        self.lines = lines

    def get(self) -> Any:
        for line in self.lines:
            logging.getLogger("transformers.some_model").warning("%s", line)
            logging.getLogger("httpx").info("%s, in passing", line)
            warnings.warn(line, FutureWarning, stacklevel=1)
            logging.getLogger("ours").error("%s", line)
            logging.getLogger("ours").error("%d is no number", line)
        raise DataError("a row has no target")


def attempt(url: str, model: LoadedModel) -> int:
    """The exit status of an attempt that meets this model."""

    def run() -> None:
        # As in a process that pytest does not listen to.
        logging.basicConfig(force=True, stream=sys.__stderr__, format="%(name)s logged: %(message)s")
        warnings.resetwarnings()
        warnings.showwarning = lambda message, *_: print(f"shown: {message}", file=sys.__stderr__)
        run_attempt(Settings(url=url, queue_url="postgresql://"), STARTED, model)

    process = forks.Process(target=run)
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def ended(job: Any) -> Answer:
    return problem("job-finished", 409)  # the report has been taken before, and nobody reads the answer


def test_warnings_of_an_attempt_are_told_once_and_written_as_before(capfd: pytest.CaptureFixture[str]) -> None:
    with registry(lambda what, body: ended(body) if what == "failure" else (200, {})) as service:
        assert attempt(service.url, Says("some weights are new", "some weights are new")) == 0
        assert service.events("log") == [
            "transformers.some_model: some weights are new",
            "FutureWarning: some weights are new",
            "ours: some weights are new",
        ]
        assert [failure["reason"] for failure in service.bodies("failure")] == ["data"]
    written = capfd.readouterr().err
    assert written.count("shown: some weights are new") == 1  # Python says it once for each line
    assert written.count("ours logged: some weights are new") == 2


@pytest.mark.parametrize(("kind", "status"), [("invalid-request", 422), ("internal", 500), ("too-large", 413)])
def test_how_an_attempt_ended_is_told_also_where_its_events_are_refused(kind: str, status: int) -> None:
    answers = {"events": problem(kind, status), "failure": ended(None)}
    with registry(lambda what, body: answers[what]) as service:
        assert attempt(service.url, Says()) == 0
        assert [failure["reason"] for failure in service.bodies("failure")] == ["data"]


@pytest.mark.parametrize(("kind", "status"), [("unauthorized", 401), ("forbidden", 403), ("internal", 500)])
def test_an_attempt_that_may_not_tell_how_it_ended_leaves_that_open(kind: str, status: int) -> None:
    with registry(lambda what, body: problem(kind, status) if what == "failure" else (200, {})) as service:
        assert attempt(service.url, Says()) == os.EX_TEMPFAIL


@pytest.mark.parametrize("refusal", [problem("invalid-request", 422), problem("too-large", 413)])
def test_events_that_are_refused_hold_up_no_others(refusal: Answer, capsys: pytest.CaptureFixture[str]) -> None:
    taken: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        if b"too much" in request.content:
            return httpx.Response(refusal[0], json=refusal[1])
        taken.append(request.content.decode())
        return httpx.Response(200, json={})

    with Client("http://service", transport=httpx.MockTransport(answer)) as client:
        events = Events(client, STARTED)
        events.log("too much")
        events.flush()
        events.log("just right")
        events.flush()
        events.flush()
    assert len(taken) == 1
    assert "just right" in taken[0]
    assert refusal[1]["detail"] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "status", "error"), [("unavailable", 503, Unavailable), ("internal", 500, ProblemError)]
)
def test_events_that_cannot_be_taken_now_are_sent_again(kind: str, status: int, error: type[Exception]) -> None:
    down, taken = True, []

    def answer(request: httpx.Request) -> httpx.Response:
        if down:
            return httpx.Response(status, json=problem(kind, status)[1])
        taken.append(request.content.decode())
        return httpx.Response(200, json={})

    with Client("http://service", transport=httpx.MockTransport(answer), retries=0) as client:
        events = Events(client, STARTED)
        events.log("first")
        with pytest.raises(error):
            events.flush()
        down = False
        events.log("second")
        events.flush()
    assert len(taken) == 1
    assert taken[0].index("first") < taken[0].index("second")
