"""`tpv job`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.client.conftest import Run, line

from tpv import files
from tpv.methods import METHODS, DtvgOptions


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
