"""`tpv job compare`."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.client.conftest import Run, line

from tpv import files


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
