"""What a job costs beside its training: with idle workers, in a long queue, and by telling how it goes.

    python benchmarks/jobs.py [--jobs 500] [--workers 4] [--idle 40]

Real processes on this machine: PostgreSQL, an S3 server, the API and workers, all warm, and a T5 of two layers whose
training takes milliseconds.

- Idle: one job at a time, all workers idle. From the submission to the end of its first step; and from its end in the
  registry until a client that waits for it knows.
- Queue: many jobs at once, every fifth with a higher priority. Each is done once, and starts in order: of two jobs of
  one priority the first submitted first, and none before one of a higher priority that was there already. Workers take
  them in this order but start them at once, so that as many as there are workers may change places.
- Events: the time that training spends on reports and the sending thread on the processor, as a share of the training.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.acceptance.cluster import LABELS, Cluster, cluster, eventually, rows
from tests.service.jobs.conftest import QueueTables
from tests.worker.conftest import NUM_VIRTUAL_TOKENS, TOKEN_DIM, make_models

from tpv import Client, Job
from tpv.methods import PromptTuningOptions
from tpv_worker.backbone import Backbone
from tpv_worker.data import Row, Task
from tpv_worker.events import Events
from tpv_worker.methods import Given, PromptTuning
from tpv_worker.training import train

TINY: dict[str, Any] = {"steps": 1, "batch_size": 4}
STEPS = 4000  #: of the training that tells how it goes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=500, help="in the queue at once")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--idle", type=int, default=40, help="jobs one after the other")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as models:
        model = make_models(Path(models))["encoder-decoder"]
        names = [f"worker-{place}" for place in range(arguments.workers)]
        with cluster(Path(models), workers=names, queues="default") as made:
            prepare(made, model)
            idle(made.client, arguments.idle)
            queue(made.client, arguments.jobs, arguments.workers)
            events(made, model)


def prepare(made: Cluster, model: Path) -> None:
    """Starts the workers, and has each of them do a job, so that it has the model."""
    P_init = np.random.default_rng(0).standard_normal((NUM_VIRTUAL_TOKENS, TOKEN_DIM), dtype=np.float32)
    made.client.initializations.create("family", base_model=str(model), unpinned=True, tensor=P_init)
    made.client.datasets.upload("data", rows(1, 16), rows(1, 8), label_words=LABELS)
    for worker in made.workers:
        worker.start()
    eventually(lambda: len([*made.client.workers.list()]) == len(made.workers))
    warm: set[str] = set()
    while len(warm) < len(made.workers):
        jobs = [submit(made.client, f"warm-{place}") for place in range(2 * len(made.workers))]
        made.client.jobs.wait_all(jobs, timeout=300)
        warm |= {attempt.worker for job in jobs for attempt in job.attempts}


def submit(client: Client, output: str, **more: Any) -> Job:
    return client.jobs.tune(dataset="data", initialization="family", output=output, **TINY, **more)


def idle(client: Client, count: int) -> None:
    begun, seen = [], []
    for place in range(count):
        job = submit(client, f"idle-{place}").wait(timeout=60)
        now = time.time()
        assert job.finished_at is not None
        seen.append(now - job.finished_at.timestamp())
        [first] = [event for event in job.events() if event.type == "progress"]
        begun.append((first.at - job.created_at).total_seconds())
    print(f"{'':34}{'median ms':>10}{'p95 ms':>10}{'worst ms':>10}")
    for name, seconds in (("submitted to first step", begun), ("finished to seen", seen)):
        figures = median(seconds), float(np.quantile(seconds, 0.95)), max(seconds)
        print(f"{name:34}" + "".join(f"{1000 * figure:10.0f}" for figure in figures))


def queue(client: Client, count: int, workers: int) -> None:
    began = time.monotonic()
    jobs = [submit(client, f"queued-{place}", priority=int(place % 5 == 0)) for place in range(count)]
    submitted = time.monotonic() - began
    client.jobs.wait_all(jobs, timeout=3600)
    took = time.monotonic() - began
    for job in jobs:
        assert [attempt.state for attempt in job.attempts] == ["succeeded"]
    # The same bytes each time: each job's own name has one version of them.
    assert all([version.version for version in client.vectors.versions(str(job.output))] == [1] for job in jobs)

    starts = {job.id: (job.started_at or job.created_at) for job in jobs}
    late = 0
    for priority in (0, 1):
        order = [starts[job.id] for job in jobs if job.priority == priority]
        late = max([late, *(sum(later < start for later in order[place:]) for place, start in enumerate(order))])
    overtaken = 0
    for high in (job for job in jobs if job.priority):
        between = [low for low in jobs if not low.priority and high.created_at < starts[low.id] < starts[high.id]]
        overtaken = max(overtaken, len(between))
    print(
        f"{count} jobs by {workers} workers: all done once; submitted in {submitted:.1f} s, done after {took:.1f} s "
        f"({count / took:.1f} a second); at most {late} started before an earlier one of its priority, and {overtaken} "
        "before one of a higher priority that was there"
    )
    assert late < workers
    assert overtaken <= workers


class Measured(Events):
    """Knows how long training waited for it, and its own thread worked."""

    told = sent = 0.0  #: seconds

    def add(self, type: str, **data: Any) -> None:  # noqa: A002
        began = time.perf_counter()
        super().add(type, **data)
        self.told += time.perf_counter() - began

    def flush(self) -> None:
        began = time.thread_time()
        super().flush()
        self.sent += time.thread_time() - began


def events(made: Cluster, model: Path) -> None:
    client = made.client
    backbone = Backbone.load(model)
    options = PromptTuningOptions(steps=STEPS, batch_size=4, evaluate_every=50)
    job = submit(client, "told", queue="nobody")
    queue = QueueTables(made.postgres.url)
    queue.hold(job.id, silent_for=-3600)  # the service misses no heartbeat
    reports = Measured(client, client.jobs.start_attempt(job, "benchmark", queue.entry(job.id)))
    P_init = torch.randn(NUM_VIRTUAL_TOKENS, TOKEN_DIM, generator=torch.Generator().manual_seed(0))
    method = PromptTuning(options, Given(backbone=backbone, initialization=P_init))
    task = Task(train=[Row(**row) for row in rows(1, 16)], validation=[], label_words=("yes", "no"))
    result = train(backbone, method, [task], options=options, seed=0, report=lambda event: reports.add(**event))
    reports.flush()
    job.cancel()
    told, sent = (100 * seconds / result.wall_seconds for seconds in (reports.told, reports.sent))
    count = len([event for event in job.events() if event.type == "progress"])
    print(
        f"{count} events of {STEPS} steps of {1000 * result.wall_seconds / STEPS:.1f} ms: training waited {told:.2f} % "
        f"of its time for them, and sending them took {sent:.2f} % of it on the processor"
    )


if __name__ == "__main__":
    main()
