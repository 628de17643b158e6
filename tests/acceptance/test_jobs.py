"""Jobs on real processes: `tpv up` with its API and a worker, and tiny models with random weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from tpv import Client, Job, files
from tpv.cli import main as cli
from tpv.errors import JobFailed
from tpv.methods import METHODS, InitializeOptions, PromptTuningOptions
from tpv.schemas.initializations import BaseModelFacts
from tpv_worker.backbone import Backbone
from tpv_worker.data import Row
from tpv_worker.evaluation import evaluate
from tpv_worker.initialization import draw

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

Models = dict[str, Path]

NUM_VIRTUAL_TOKENS = 3
LABELS = ["yes", "no"]
FAST = {"steps": 12, "batch_size": 4, "evaluate_every": 6, "learning_rate": 0.1}
ENDLESS = FAST | {"steps": 10_000_000, "evaluate_every": 1_000_000}


def rows(word: int, count: int) -> list[dict[str, str]]:
    """The answer is `yes` where the text holds a certain word."""
    draws = np.random.default_rng(word)
    texts = [[f"w{n}" for n in draws.integers(10, 40, 1 + i % 5)] for i in range(count)]
    return [
        {"source": " ".join([f"w{word}", *text] if i % 2 else text), "target": "yes" if i % 2 else "no"}
        for i, text in enumerate(texts)
    ]


@pytest.fixture(scope="module")
def stack(model_paths: Models) -> Iterator[tuple[str, int]]:
    """Where the service is, and the process that supervises it."""
    with tempfile.TemporaryDirectory(prefix="tpv-") as place:
        Path(place).chmod(0o711)  # as root, PostgreSQL runs as a user of its own and has to get in
        environment = os.environ | {
            "TPV_STALLED_AFTER": "PT12S",  # heartbeats come every 5 s
            "TPV_STALLED_CHECK": "PT1S",
            "TPV_THREADS": "1",
            "TPV_DATA_CACHE": f"{place}/cache",
        }
        options = ["--data-dir", f"{place}/data", "--port", "0", "--workers", "1"]
        options += ["--model-directory", str(model_paths["decoder-only"].parent)]
        command = [sys.executable, "-m", "tpv.cli.main", "up", *options]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout is not None
            try:
                line = process.stdout.readline()
                assert "ready at " in line, line
                yield line.split("ready at ")[1].strip(), process.pid
            finally:
                process.terminate()
        assert process.returncode == 0


@pytest.fixture
def client(stack: tuple[str, int]) -> Iterator[Client]:
    with Client(stack[0]) as client:
        yield client


@pytest.fixture(params=["encoder-decoder", "decoder-only"])
def model(request: pytest.FixtureRequest, model_paths: Models) -> Path:
    path: Path = model_paths[request.param]
    return path


def test_initialize_tune_and_transfer(client: Client, model: Path) -> None:
    space = model.name  # a namespace for each model
    init = client.initializations.create(
        f"{space}/family", base_model=str(model), num_virtual_tokens=NUM_VIRTUAL_TOKENS, seed=3, timeout=120
    )
    backbone = Backbone.load(model)
    start = client.initializations.load(init)
    options = InitializeOptions(num_virtual_tokens=NUM_VIRTUAL_TOKENS)
    assert np.array_equal(start, draw(options, 3, backbone.embeddings, backbone.tokenizer).numpy())
    assert init.base_model.verified
    assert init.base_model.embedding_digest == backbone.embedding_digest()

    for name, word in (("one", 1), ("two", 2), ("goal", 3)):
        splits = rows(word, 32), rows(word, 16), rows(word + 4, 20)
        client.datasets.upload(f"{space}/{name}", *splits, label_words=LABELS)
    tunings = [
        client.jobs.tune(dataset=f"{space}/{name}", initialization=f"{space}/family", output=f"{space}/{name}", **FAST)
        for name in ("one", "two")
    ]
    client.jobs.wait_all(tunings, timeout=120)
    transfer = client.jobs.transfer(
        target=f"{space}/goal",
        sources=[f"{space}/one", f"{space}/two"],
        dataset=f"{space}/goal",
        output=f"{space}/goal-dtvg",
        shots=16,
        target_options=FAST,
        **FAST,
    )
    assert (transfer.state, transfer.reason) == ("queued", "waiting")
    transfer.wait(timeout=120)

    own = client.jobs.get(transfer.needs[0])
    assert (own.state, own.result) == ("succeeded", f"{space}/goal:1")
    assert transfer.result == f"{space}/goal-dtvg:1"
    version = client.vectors.get(transfer.result)
    sources = [f"{space}/one:1", f"{space}/two:1"]
    assert [(parent.reference, parent.role) for parent in version.parents] == [
        (f"{space}/goal:1", "target"),
        (sources[0], "source"),
        (sources[1], "source"),
    ]
    assert version.provenance["libraries"]["torch"] == torch.__version__
    assert list(version.provenance["scales"]) == sources
    assert set(version.provenance["group"]) <= set(sources)
    assert transfer.metrics["target_steps"] == FAST["steps"]
    assert transfer.metrics["test/majority"] == 0.5
    events = list(transfer.events())
    assert {event.type for event in events} >= {"state", "phase", "progress", "evaluation"}
    assert events[-1].data["state"] == "succeeded"

    # What the registry gives, read by anybody else, predicts what the worker has reported.
    for reference in (*sources, f"{space}/goal:1", f"{space}/goal-dtvg:1"):
        version = client.vectors.get(reference)
        prompt = torch.from_numpy(version.load().apply(start).copy())
        assert {figure.split for figure in version.evaluations} == {"validation", "test"}
        for figure in version.evaluations:
            read = [Row(**row) for row in client.datasets.rows(figure.dataset, figure.split)]
            examples = backbone.tokenize(read, PromptTuningOptions(), NUM_VIRTUAL_TOKENS)
            again = evaluate(backbone, prompt, examples, label_words=LABELS, options=PromptTuningOptions())
            assert again.value == figure.value
            assert again.predictions == [row["prediction"] for row in client.vectors.predictions(figure)]
            assert figure.n == len(read)


def test_every_method_is_one_word(
    client: Client, model_paths: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_paths["encoder-decoder"]
    initialization = client.initializations.create(
        "every/family", base_model=str(model), num_virtual_tokens=NUM_VIRTUAL_TOKENS, seed=7, timeout=120
    )
    start = client.initializations.load(initialization)
    for name, word in (("one", 1), ("two", 2), ("goal", 3), ("more", 4)):
        client.datasets.upload(f"every/{name}", rows(word, 24), rows(word, 8), rows(word + 4, 12), label_words=LABELS)
    for number in range(10):  # of a centre
        client.vectors.register(f"every/s{number}", vector=start * number, initialization=initialization)
    few = {"steps": 4, "batch_size": 4, "evaluate_every": 2}
    common = {"dataset": "every/goal", "initialization": initialization, **few}
    sources = ["every/one", "every/two"]
    client.jobs.wait_all(
        [client.jobs.tune(**common | {"dataset": source, "output": source}) for source in sources], timeout=120
    )
    small: dict[str, dict[str, Any]] = {
        "dtvg": {"center": True},
        "attempt": {"bottleneck": 2},
        "mpt": {"source_steps": 4},
        "dept": {"prompt_tokens": 2, "rank": 2},
        "lora": {"rank": 2},
    }

    jobs: dict[str, Job] = {}
    for name, method in METHODS.items():
        if method.result == "initialization":
            continue
        members = common | small.get(name, {}) | {"method": name}
        if method.result == "vector":
            members["output"] = f"every/goal-{name}"
        if method.datasets:
            members["datasets"] = sources if method.datasets == "sources" else ["every/more"]
        if method.target:
            members |= {"target": "every/goal", "target_options": few}
        ask = client.jobs.transfer if method.sources else client.jobs.tune
        jobs[name] = ask(**members | ({"sources": sources} if method.sources else {}))
    client.jobs.wait_all(list(jobs.values()), timeout=300)

    for name, job in jobs.items():
        method = METHODS[name]
        both = method.datasets == "together"
        further = "every/more:1" if both else "every/goal:1"
        assert {(e.dataset, e.split) for e in job.evaluations} == {
            (dataset, split) for dataset in ("every/goal:1", further) for split in ("validation", "test")
        }
        assert ("every/more:1/test/majority" in job.metrics) == both
        assert job.metrics["test/accuracy"] == next(
            e.value for e in job.evaluations if (e.dataset, e.split) == ("every/goal:1", "test")
        )
        assert all(client.vectors.predictions(evaluation) for evaluation in job.evaluations)
        assert (job.result is not None, job.artifact is not None) == {
            "vector": (True, False),
            "artifact": (False, True),
            "metrics": (False, False),
        }[method.result]
        if job.result:
            assert client.vectors.describe(f"every/goal-{name}").tasks == ["every/goal", "every/more"][: 1 + both]
            assert np.isfinite(client.vectors.get(job.result).load().tensor).all()
        if job.artifact:
            tensors = files.load(client.jobs.download(job, tmp_path / name).read_bytes())
            assert tensors
            assert files.metadata((tmp_path / name).read_bytes()) == {"method": name}
            assert job.provenance is not None
            assert job.provenance["best_step"] in (2, 4)
    center = jobs["dtvg"].spec.center
    assert center is not None
    assert center.size == 12  # the ten, and the two sources

    status = cli.main(["--url", str(client.url), "job", "compare", *(str(job.id) for job in jobs.values()), "--paired",
                       str(jobs["prompt-tuning"].id), "--json"])  # fmt: skip
    compared = json.loads(capsys.readouterr().out)["results"]
    assert status == 0
    assert [entry["method"] for entry in compared] == list(jobs)
    assert [entry["value"] for entry in compared] == [job.metrics["test/accuracy"] for job in jobs.values()]


def test_what_a_job_needs_is_done_first(client: Client, model_paths: Models) -> None:
    space = "pipeline"
    client.initializations.create(
        f"{space}/family", base_model=str(model_paths["encoder-decoder"]), num_virtual_tokens=NUM_VIRTUAL_TOKENS,
        seed=11, timeout=120,
    )  # fmt: skip
    for name, word in (("one", 1), ("goal", 3)):
        client.datasets.upload(f"{space}/{name}", rows(word, 16), rows(word, 8), label_words=LABELS)
    transfer = client.jobs.transfer(
        target=f"{space}/goal",
        sources=[f"{space}/one"],
        prepare={f"{space}/one": f"{space}/one"},
        dataset=f"{space}/goal",
        initialization=f"{space}/family",
        output=f"{space}/goal-dtvg",
        target_options=FAST,
        **FAST,
    )
    later = client.jobs.tune(
        dataset=f"{space}/one", initialization=f"{space}/family", output=f"{space}/later", needs=[transfer], **FAST
    )
    assert {needed.output for needed in transfer.needed} == {f"{space}/one", f"{space}/goal"}
    assert [(job.state, job.reason) for job in (transfer, later)] == [("queued", "waiting")] * 2
    later.wait(timeout=120)
    transfer.refresh()
    assert [source.reference for source in transfer.spec.sources] == [f"{space}/one:1"]
    ended = [client.jobs.get(needed.id).finished_at for needed in transfer.needed]
    assert all(end is not None and transfer.started_at is not None and end <= transfer.started_at for end in ended)
    assert transfer.finished_at is not None
    assert later.started_at is not None
    assert transfer.finished_at <= later.started_at


def test_the_same_job_again_gives_the_same_bytes(client: Client, model: Path) -> None:
    first, second = (training(client, model, output="same", **FAST) for _ in range(2))
    client.jobs.wait_all([first, second], timeout=120)

    assert (first.result_created, second.result_created) == (True, False)
    assert first.result == second.result == f"{model.name}-faults/same:1"


@pytest.mark.parametrize(
    ("changes", "reason", "text"),
    [
        ({"base_model": "/etc"}, "model", "the worker may not read /etc"),
        ({"base_model": "{models}/../llama"}, "model", "the worker may not read"),
        ({"base_model": "{models}/gone"}, "model", "cannot load the model"),
        ({"top_k": 2}, "options", "raise top_k"),
    ],
)
def test_a_job_that_cannot_succeed_says_why(
    client: Client,
    model_paths: Models,
    changes: dict[str, Any],
    reason: str,
    text: str,
) -> None:
    model = model_paths["decoder-only"]
    arguments = {"base_model": str(model)} | changes
    arguments["base_model"] = arguments["base_model"].format(models=model.parent)
    with pytest.raises(JobFailed, match=text) as caught:
        client.jobs.initialize(num_virtual_tokens=NUM_VIRTUAL_TOKENS, **arguments).wait(timeout=60)
    assert caught.value.job.reason == reason


def test_rows_that_do_not_fit_are_found_before_training(client: Client, model_paths: Models) -> None:
    space, model = "misfits", model_paths["encoder-decoder"]
    client.initializations.create(
        f"{space}/family", base_model=str(model), num_virtual_tokens=NUM_VIRTUAL_TOKENS, seed=8, timeout=120
    )
    long = [{"source": "w1", "target": " ".join(["w2"] * 30)}]
    client.datasets.upload(f"{space}/one", rows(1, 8), rows(1, 8), long)
    job = client.jobs.tune(dataset=f"{space}/one", initialization=f"{space}/family", output=f"{space}/one", **FAST)
    with pytest.raises(JobFailed, match="has 30 tokens, max_target_tokens is 16") as caught:
        job.wait(timeout=60)
    assert caught.value.job.reason == "data"
    assert "progress" not in {event.type for event in job.events()}


def test_a_training_that_diverges_is_not_tried_again(client: Client, model_paths: Models) -> None:
    """At such a rate the second step's weight decay is beyond the range of float32."""
    job = training(client, model_paths["decoder-only"], **FAST | {"learning_rate": 1e30})
    with pytest.raises(JobFailed, match=r"training diverged: .* lower the learning rate") as caught:
        job.wait(timeout=60)
    assert [(a.state, a.reason) for a in caught.value.job.attempts] == [("failed", "nan-loss")]


def test_another_model_than_the_initializations_is_refused(client: Client, model_paths: Models) -> None:
    model, space = model_paths["decoder-only"], "other"
    client.initializations.create(
        f"{space}/family",
        base_model=str(model),
        tensor=torch.ones(NUM_VIRTUAL_TOKENS, Backbone.load(model).token_dim),
        base_model_facts=BaseModelFacts(digest="sha256:" + "0" * 64),
    )
    client.datasets.upload(f"{space}/one", rows(1, 8))
    job = client.jobs.tune(dataset=f"{space}/one", initialization=f"{space}/family", output=f"{space}/one", **FAST)
    with pytest.raises(JobFailed, match="is not the model that the initialization was made for") as caught:
        job.wait(timeout=60)
    assert caught.value.job.reason == "model"


def test_only_attempts_hold_torch(stack: tuple[str, int], running: Job) -> None:
    """Neither the service nor the worker imports it; `running` makes sure that there is an attempt."""
    worker = worker_of(stack)
    [attempt] = attempts_of(worker)
    [api] = [child for child in psutil.Process(stack[1]).children() if "tpv_service.server" in child.cmdline()]
    assert [holds_torch(process) for process in (attempt, worker, api)] == [True, False, False]


def test_a_model_is_loaded_once_for_the_jobs_of_it(client: Client, stack: tuple[str, int], model_paths: Models) -> None:
    def host_after_a_job_of(kind: str) -> psutil.Process:
        training(client, model_paths[kind], **FAST).wait(timeout=60)
        [host] = hosts_of(worker_of(stack))  # the last model's; others have ended
        return host

    first = host_after_a_job_of("encoder-decoder")
    assert host_after_a_job_of("encoder-decoder") == first
    other = host_after_a_job_of("decoder-only")
    assert other != first
    assert gone(first)


def holds_torch(process: psutil.Process) -> bool:
    return any("libtorch" in mapped.path for mapped in process.memory_maps())


# --- Faults


def training(client: Client, model: Path, *, output: str | None = None, **options: Any) -> Job:
    space = f"{model.name}-faults"
    client.initializations.create(
        f"{space}/family", base_model=str(model), num_virtual_tokens=NUM_VIRTUAL_TOKENS, seed=5, timeout=120
    )
    client.datasets.upload(f"{space}/one", rows(1, 32), rows(1, 8), label_words=LABELS)
    return client.jobs.tune(
        dataset=f"{space}/one",
        initialization=f"{space}/family",
        output=f"{space}/{output or time.time_ns()}",
        **options,
    )


@pytest.fixture
def running(client: Client, model_paths: Models) -> Iterator[Job]:
    """A job that trains, and would go on for ever."""
    job = training(client, model_paths["decoder-only"], **ENDLESS)
    eventually(lambda: (job.refresh().progress.step or 0) > 0)
    yield job
    if not job.refresh().finished:
        job.cancel()


def eventually(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def worker_of(stack: tuple[str, int]) -> psutil.Process:
    [worker] = [child for child in psutil.Process(stack[1]).children() if "tpv_worker" in child.cmdline()]
    return worker


def hosts_of(worker: psutil.Process) -> list[psutil.Process]:
    """The processes that hold a model: children of the server that they are forked from."""
    return [host for server in worker.children() for host in server.children()]


def attempts_of(worker: psutil.Process) -> list[psutil.Process]:
    """The processes that train."""
    return [attempt for host in hosts_of(worker) for attempt in host.children()]


def gone(process: psutil.Process) -> bool:
    """Whether it has ended; somebody else may not have asked for its exit status yet."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_killed_attempt_is_followed_by_another_one(stack: tuple[str, int], running: Job) -> None:
    [attempt] = attempts_of(worker_of(stack))
    attempt.kill()
    eventually(
        lambda: [(a.state, a.reason) for a in running.refresh().attempts] == [("failed", "killed"), ("running", None)]
    )


def test_a_cancelled_job_stops_its_attempt(
    client: Client,
    stack: tuple[str, int],
    running: Job,
    model_paths: Models,
) -> None:
    [attempt] = attempts_of(worker_of(stack))
    running.cancel()
    eventually(lambda: gone(attempt), seconds=20)
    training(client, model_paths["decoder-only"], **FAST).wait(timeout=60)


def test_the_job_of_a_killed_worker_is_taken_by_the_next_one(stack: tuple[str, int], running: Job) -> None:
    worker = worker_of(stack)
    processes = [worker, *worker.children(recursive=True)]
    worker.kill()
    eventually(lambda: all(map(gone, processes)), seconds=20)
    eventually(
        lambda: [(a.number, a.state) for a in running.refresh().attempts] == [(1, "superseded"), (2, "running")],
        seconds=90,
    )
    assert "worker-lost" in [event.data.get("reason") for event in running.events()]
