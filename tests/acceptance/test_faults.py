"""Whatever dies, stalls or is full while a job runs: it ends once, with the result of the undisturbed run.

More rounds than the suite has, from the root of the repository: python -m tests.acceptance.test_faults ROUNDS [SEED]
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from tests.acceptance.cluster import LABELS, PATIENCE, Cluster, cluster, eventually, gone, rows
from tests.service.jobs.conftest import QueueTables
from tests.worker.conftest import NUM_VIRTUAL_TOKENS, TOKEN_DIM, _one_thread, make_models, model_paths  # noqa: F401

from tpv import Job
from tpv.schemas.jobs import Event

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SEED = int(os.environ.get("TPV_FAULTS_SEED", "1"))
STEPS = 600  # some seconds: faults come while it runs, however fast the machine is
ENDED = 60  #: seconds in which processes whose worker is gone end; Python takes its time to take torch down
OPTIONS: dict[str, Any] = {"steps": STEPS, "batch_size": 4, "evaluate_every": 50, "learning_rate": 0.05}


class Faults:
    """Jobs that are disturbed, one after the other, and what an undisturbed one gives."""

    def __init__(self, where: Cluster, model: Path, seed: int) -> None:
        self.cluster, self.client, self.seed = where, where.client, seed
        self.count = 0
        sys.stdout.write(f"the seed is {seed}\n")
        for worker in where.workers:
            worker.start()
        draws = np.random.default_rng(0)
        P_init, target, *sources = 0.3 * draws.standard_normal((5, NUM_VIRTUAL_TOKENS, TOKEN_DIM), dtype=np.float32)
        self.client.initializations.create("family", base_model=str(model), unpinned=True, tensor=P_init)
        self.client.datasets.upload("goal", rows(1, 32), rows(1, 8), rows(2, 8), label_words=LABELS)
        self.client.vectors.register("goal", vector=target, initialization="family", task="goal")
        for place, source in enumerate(sources):
            self.client.vectors.register(f"s{place}", vector=source, initialization="family")
        undisturbed = self.submit("undisturbed").wait(timeout=200)
        assert undisturbed.started_at is not None
        assert undisturbed.finished_at is not None
        self.fingerprint = self.client.vectors.get("undisturbed").fingerprint
        self.seconds = (undisturbed.finished_at - undisturbed.started_at).total_seconds()

    def submit(self, output: str, **options: Any) -> Job:
        return self.client.jobs.transfer(
            target="goal", sources=["s0", "s1", "s2"], dataset="goal", output=output, **OPTIONS | options
        )

    def round(self, name: str) -> Job:
        """One job, and one fault at a random moment of it; what must hold then."""
        self.count += 1
        draws = np.random.default_rng([self.seed, self.count])
        job = self.submit(f"{name}-{self.count}")
        eventually(lambda: job.refresh().attempts)
        time.sleep(draws.uniform(0, self.seconds))
        fault, reasons = FAULTS[name]
        fault(self, job, draws)
        eventually(lambda: job.refresh().finished)
        self.check(job, *reasons)
        return job

    def check(self, job: Job, *reasons: str) -> None:
        """It has succeeded, and the attempts before ended for one of these reasons."""
        assert (job.state, job.reason) == ("succeeded", None)
        assert [attempt.number for attempt in job.attempts] == list(range(1, len(job.attempts) + 1))
        *others, last = job.attempts
        assert last.state == "succeeded"
        assert {attempt.state for attempt in others} <= {"failed", "superseded"}
        assert {attempt.reason for attempt in others} <= {*reasons}
        [version] = self.client.vectors.versions(str(job.output))
        assert version.fingerprint == self.fingerprint
        assert job.result == f"{version.namespace}/{version.name}:{version.version}"
        events = [*job.events()]
        assert [event.id for event in events] == sorted({event.id for event in events})
        assert [event.data["state"] for event in events if event.type == "state"].count(job.state) == 1
        for attempt in job.attempts:  # no step is told twice in an attempt, and none after a later one
            steps = [e.data["step"] for e in events if e.type == "progress" and e.attempt == attempt.number]
            assert steps == sorted({*steps})

    def check_the_rest(self) -> None:
        """Nothing runs on, and nothing has run twice."""
        assert [*self.client.jobs.list(state="running"), *self.client.jobs.list(state="queued")] == []
        assert QueueTables(self.cluster.postgres.url).disagreements() == []
        for vector in self.client.vectors.list():
            assert vector.newest_version == 1


# --- What happens ----------------------------------------------------------------------------------------------------


def kill_the_attempt(faults: Faults, job: Job, draws: np.random.Generator) -> None:
    for worker in faults.cluster.workers:
        if processes := worker.attempts():  # several, where they train together
            processes[draws.integers(len(processes))].kill()


def kill_the_worker(faults: Faults, job: Job, draws: np.random.Generator) -> None:
    worker = faults.cluster.worker_of(str(job.id)) or faults.cluster.workers[0]
    family = worker.family()
    worker.kill()
    eventually(lambda: all(map(gone, family)), ENDED)
    worker.start()


def kill_the_api(faults: Faults, job: Job, draws: np.random.Generator) -> None:
    faults.cluster.api.kill()
    time.sleep(draws.uniform(0, 2))
    faults.cluster.start_api()


def kill_postgres(faults: Faults, job: Job, draws: np.random.Generator) -> None:
    faults.cluster.kill_postgres()
    time.sleep(draws.uniform(0, 2))
    faults.cluster.start_postgres()


def stop_the_store(faults: Faults, job: Job, draws: np.random.Generator) -> None:
    faults.cluster.store.stop()
    time.sleep(5)
    faults.cluster.store.start()


def fill_the_disk(faults: Faults, job: Job, draws: np.random.Generator) -> None:
    with faults.cluster.full_disk():
        time.sleep(4)


def freeze_the_worker(faults: Faults, job: Job, draws: np.random.Generator) -> None:
    worker = faults.cluster.worker_of(str(job.id))
    if worker is None:
        return  # it has ended before
    number = len(job.attempts)
    worker.send(signal.SIGSTOP)
    try:
        eventually(lambda: len(job.refresh().attempts) > number or job.finished)
        time.sleep(draws.uniform(0, faults.seconds))
    finally:
        worker.send(signal.SIGCONT)


def stop_the_worker(faults: Faults, job: Job, draws: np.random.Generator) -> None:
    """By SIGTERM, as an operator or a cluster does."""
    worker = faults.cluster.worker_of(str(job.id)) or faults.cluster.workers[0]
    family = worker.family()
    worker.stop()
    assert worker.process is not None
    assert worker.process.returncode == 0
    eventually(lambda: all(map(gone, family)), ENDED)
    worker.start()


#: Each with what may end an attempt.
FAULTS: dict[str, tuple[Callable[[Faults, Job, np.random.Generator], None], set[str]]] = {
    "attempt": (kill_the_attempt, {"killed"}),
    "stop": (stop_the_worker, {"drained"}),
    "api": (kill_the_api, {"worker-lost", "unavailable"}),
    "postgres": (kill_postgres, {"worker-lost", "unavailable"}),
    "store": (stop_the_store, {"unavailable"}),
    "disk": (fill_the_disk, {"unavailable"}),
    "worker": (kill_the_worker, {"worker-lost"}),
    "frozen": (freeze_the_worker, {"worker-lost"}),
}


@pytest.fixture(scope="module")
def faults(model_paths: dict[str, Path]) -> Iterator[Faults]:  # noqa: F811
    model = model_paths["encoder-decoder"]
    with cluster(model.parent, queues="default") as made:
        found = Faults(made, model, SEED)
        yield found
        found.check_the_rest()
        made.stop()
        eventually(lambda: not made.orphans(), ENDED)


@pytest.mark.parametrize("name", FAULTS)
def test_a_job_ends_once_with_the_result_of_the_undisturbed_run(faults: Faults, name: str) -> None:
    faults.round(name)


def at_step(job: Job, step: int) -> None:
    """Waits until a job has come so far."""
    eventually(lambda: (job.refresh().progress.step or 0) >= step)


def checkpoints_of(job: Job, attempt: int) -> list[int]:
    return [e.data["step"] for e in job.events() if e.type == "checkpoint" and e.attempt == attempt]


def went_on(job: Job) -> list[str]:
    """What was said of the checkpoints that attempts have gone on from."""
    messages = [event.data["message"] for event in job.events() if event.type == "phase"]
    return [message for message in messages if message.startswith("going on after")]


def test_when_all_workers_die_the_job_waits_for_one_and_repeats_one_interval_at_most(faults: Faults) -> None:
    length = 5 * STEPS  # so that the second half takes longer than it takes to hear of it
    job = faults.submit("late", steps=length)
    at_step(job, length // 2)
    families = [process for worker in faults.cluster.workers for process in worker.family()]
    killed = time.time()
    for worker in faults.cluster.workers:
        worker.kill()
    try:
        assert job.refresh().state == "running"
        # Nobody else is there. It takes less than 60 s, longer where tests share a busy machine.
        eventually(lambda: (job.refresh().state, job.reason) == ("queued", "worker-lost"), 120)
        eventually(lambda: all(map(gone, families)), ENDED)
    finally:
        for worker in faults.cluster.workers:
            worker.start()
    assert job.wait(timeout=120).state == "succeeded"

    told = [event for event in job.events() if event.attempt == 1]
    stored = [event for event in told if event.type == "checkpoint"]
    last = stored[-1].data["step"]
    assert went_on(job) == [f"going on after step {last} of attempt 1"]
    assert min(e.data["step"] for e in job.events() if e.attempt == 2 and e.type == "progress") > last
    # When the states were taken: what was reported last died with the worker, so by the pace at the end.
    reached, at = zip(*((e.data["step"], e.at.timestamp()) for e in told if e.type == "progress"), strict=True)
    pace = (at[-1] - at[-20]) / (reached[-1] - reached[-20])
    steps = [event.data["step"] for event in stored]
    taken = [np.interp(step, reached, at) + pace * max(0, step - reached[-1]) for step in steps]
    # An interval as it was: from a state until the next one was stored.
    intervals = [after.at.timestamp() - before for before, after in zip(taken, stored[1:], strict=False)]
    assert killed - taken[-1] <= max(intervals)


def test_a_worker_that_stops_gives_its_job_back_after_the_step(faults: Faults) -> None:
    job = faults.submit("drained")
    at_step(job, STEPS // 10)
    worker = faults.cluster.worker_of(str(job.id))
    assert worker is not None
    worker.stop()
    job.wait(timeout=120)
    worker.start()
    faults.check(job, "drained")

    first, *_ = job.attempts
    assert (first.state, first.reason) == ("failed", "drained")
    assert first.message is not None
    assert first.message.endswith(f"training has ended after step {checkpoints_of(job, 1)[-1]}")
    assert len(job.attempts) == 2
    assert job.attempts[1].worker != first.worker


def test_a_cancelled_job_goes_on_where_it_was(faults: Faults) -> None:
    job = faults.submit("cancelled")
    eventually(lambda: checkpoints_of(job, 1))
    worker = faults.cluster.worker_of(str(job.id))
    assert worker is not None
    [attempt] = worker.attempts()
    assert job.cancel().state == "cancelled"
    eventually(lambda: gone(attempt), 2 + 1)
    kept = checkpoints_of(job, 1)[-1]
    assert job.retry().state == "queued"
    job.wait(timeout=120)
    faults.check(job, "cancelled")
    assert went_on(job) == [f"going on after step {kept} of attempt 1"]


def test_a_retry_may_begin_anew(faults: Faults) -> None:
    job = faults.submit("fresh")
    eventually(lambda: checkpoints_of(job, 1))
    job.cancel()
    job.retry(fresh=True).wait(timeout=120)
    faults.check(job, "cancelled")
    assert not went_on(job)


def test_what_happens_to_one_attempt_is_nothing_to_another(faults: Faults) -> None:
    ask = {"queue": "pair", "steps": 5 * STEPS}
    with faults.cluster.another("pair", "--queues", "pair", "--concurrency", "2") as worker:
        jobs = [faults.submit(f"pair-{place}", **ask) for place in range(2)]
        for job in jobs:
            at_step(job, STEPS // 4)
        killed, other = worker.attempts()
        killed.kill()
        eventually(lambda: any(len(job.refresh().attempts) > 1 for job in jobs))
        assert not gone(other)
        faults.client.jobs.wait_all(jobs, timeout=200)
    ends = sorted([(attempt.state, attempt.reason) for attempt in job.attempts] for job in jobs)
    assert ends == [[("failed", "killed"), ("succeeded", None)], [("succeeded", None)]]
    assert len({faults.client.vectors.get(str(job.output)).fingerprint for job in jobs}) == 1


def test_processes_that_train_together_give_what_one_does(faults: Faults) -> None:
    # A few steps: rounding errors grow tenfold in every five here, also between two ways to divide a batch.
    ask = {"steps": 5, "adam_epsilon": 0.1}
    with faults.cluster.another("together", "--queues", "together", "--processes", "2"):
        jobs = [faults.submit("alone", **ask), faults.submit("together", queue="together", **ask)]
        faults.client.jobs.wait_all(jobs, timeout=120)
    alone, together = [faults.client.vectors.get(str(job.output)) for job in jobs]
    assert (alone.provenance["processes"], together.provenance["processes"]) == (1, 2)
    assert alone.provenance["group_history"] == together.provenance["group_history"]
    np.testing.assert_allclose(together.load().tensor, alone.load().tensor, rtol=0, atol=1e-4)


def test_processes_that_train_together_are_one_attempt(faults: Faults) -> None:
    """Whichever of them dies, and when the worker stops: the next attempt goes on as this one would have."""
    with faults.cluster.another("together", "--queues", "together", "--processes", "2") as worker:

        def run(name: str, disturb: Callable[[psutil.Process, psutil.Process], object] | None, *reasons: str) -> str:
            job = faults.submit(f"together-{name}", queue="together", steps=STEPS // 4)
            if disturb is not None:
                eventually(lambda: checkpoints_of(job, 1))
                first, second = sorted(worker.attempts(), key=lambda process: process.create_time())
                disturb(first, second)
                eventually(lambda: gone(first) and gone(second), ENDED)
            job.wait(timeout=120)
            assert [attempt.reason for attempt in job.attempts] == [*reasons, None]
            assert len(went_on(job)) == len(reasons)
            return faults.client.vectors.get(str(job.output)).fingerprint

        undisturbed = run("undisturbed", None)
        assert run("first", lambda first, second: first.kill(), "killed") == undisturbed
        assert run("second", lambda first, second: second.kill(), "killed") == undisturbed
        assert run("stop", lambda *_: (worker.stop(), worker.start()), "drained") == undisturbed


def test_an_attempt_that_hangs_is_followed_by_another_one(faults: Faults) -> None:
    faults.cluster.api.kill()
    faults.cluster.start_api(TPV_SILENT_AFTER="PT8S")
    try:
        job = faults.submit("hangs")
        eventually(lambda: checkpoints_of(job, 1))
        worker = faults.cluster.worker_of(str(job.id))
        assert worker is not None
        [attempt] = worker.attempts()
        attempt.suspend()
        job.wait(timeout=120)
        faults.check(job, "timeout")
        assert len(job.attempts) == 2
        eventually(lambda: gone(attempt))
    finally:
        faults.cluster.api.kill()
        faults.cluster.start_api()


def test_a_stream_goes_on_over_a_restart_of_the_service(faults: Faults) -> None:
    job = faults.submit("followed")
    seen: list[dict[str, Any]] = []
    broken, deadline = 0, time.monotonic() + PATIENCE
    restarted = threading.Event()
    while not (seen and seen[-1]["data"].get("state") == "succeeded"):
        assert time.monotonic() < deadline
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": str(seen[-1]["id"])} if seen else {})
        try:
            for event in stream(faults.cluster.url, job, headers):
                seen.append(event)
                if event["type"] == "checkpoint" and not restarted.is_set():
                    restarted.set()
                    threading.Thread(target=kill_the_api, args=(faults, job, np.random.default_rng(0))).start()
        except httpx.HTTPError:
            broken += 1
            time.sleep(0.2)
    assert restarted.is_set()
    assert broken
    job.wait(timeout=60)
    faults.check(job)
    assert [Event.model_validate(event) for event in seen] == [*job.events()]


def stream(url: str, job: Job, headers: dict[str, str]) -> Iterator[dict[str, Any]]:
    with httpx.stream("GET", f"{url}/api/v1/jobs/{job.id}/events", headers=headers, timeout=30) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if line.startswith("data:"):
                yield json.loads(line.removeprefix("data:"))


# --- Limits ----------------------------------------------------------------------------------------------------------


def test_a_job_that_does_not_fit_the_memory_is_computed_in_parts(faults: Faults) -> None:
    """By an attempt that may take a fixed amount beside what a host of this model has."""
    long = [{**row, "source": f"{row['source']} {'w9 ' * 40}"} for row in rows(1, 2048)]
    faults.client.datasets.upload("long", long, label_words=LABELS)
    ask = {"dataset": "long", "initialization": "family", "steps": 2, "batch_size": 2048, "learning_rate": 0.1}
    servers = [server for worker in faults.cluster.workers for server in psutil.Process(worker.pid).children()]
    hosts = [host for server in servers for host in server.children()]  # of those workers that have had a job
    limit = hosts[0].memory_info().data + 200_000_000
    with faults.cluster.another("small", "--queues", "small", "--memory-limit", str(limit)):
        job = faults.client.jobs.tune(output="in-parts", queue="small", **ask).wait(timeout=200)
    said = [event.data["message"] for event in job.events() if event.type == "warning"]
    parts = [2**power for power in range(1, len(said) + 1)]
    assert said
    assert said == [f"out of memory: from now on a batch is computed in {count} parts" for count in parts]
    asked_for = faults.client.jobs.tune(output="asked-for", accumulation=parts[-1], **ask).wait(timeout=200)
    # Equal but for the order of sums: the first step may have needed fewer parts than the second.
    fell_back, asked = (faults.client.vectors.get(str(each.output)).load().tensor for each in (job, asked_for))
    assert np.linalg.norm(fell_back - asked) < 1e-4 * np.linalg.norm(asked)


def test_an_owner_has_one_running_job_at_a_time(faults: Faults) -> None:
    faults.cluster.api.kill()
    faults.cluster.start_api(TPV_JOBS_PER_OWNER="1")
    try:
        jobs = [faults.submit(f"of-one-owner-{place}", steps=100) for place in range(3)]
        eventually(lambda: "waiting" in [job.refresh().reason for job in jobs])  # two workers, and one is idle
        faults.client.jobs.wait_all(jobs, timeout=200)
    finally:
        faults.cluster.api.kill()
        faults.cluster.start_api()
    ran = [(attempt.started_at, attempt.finished_at) for job in jobs for attempt in job.attempts]
    assert len(ran) == 3
    assert all(ended is not None and ended <= start for (_, ended), (start, _) in pairwise(ran))


# --- By hand ---------------------------------------------------------------------------------------------------------


def main(rounds: int, seed: int) -> None:
    names = list(FAULTS)
    draws = np.random.default_rng(seed)
    ended: dict[str, list[str]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(prefix="tpv-models-") as models, cluster(Path(models), queues="default") as made:
        found = Faults(made, make_models(Path(models))["encoder-decoder"], seed)
        for count in range(1, rounds + 1):
            name = names[draws.integers(len(names))]
            began = time.monotonic()
            job = found.round(name)
            why = [attempt.reason or "" for attempt in job.attempts[:-1]]
            ended[name].append(", ".join(why) or "undisturbed")
            took = time.monotonic() - began
            sys.stdout.write(f"{count:3}: {name:9} succeeded, {took:.0f} s; before that: {', '.join(why)}\n")
            sys.stdout.flush()
        found.check_the_rest()
        made.stop()
        eventually(lambda: not made.orphans(), ENDED)
    for name, states in ended.items():
        counts = ", ".join(f"{states.count(state)} {state}" for state in sorted({*states}))
        sys.stdout.write(f"{name}: {counts or 'none'}\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else SEED)
