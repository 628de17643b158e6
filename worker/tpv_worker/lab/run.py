"""The lab: from an empty registry to finished transfers, on tasks whose relatedness is known by construction.

It goes through the product as any user does: it uploads data sets, has workers draw the initialization and tune the
sources, then runs each target's transfers, and reads the figures off the registry.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import tpv
from tpv import methods
from tpv_worker.lab import BASE_MODEL, REVISION
from tpv_worker.lab.world import N_COMMON, Task, rows, training_rows

NAMESPACE = "lab"
NUM_VIRTUAL_TOKENS = 20
TRAIN_ROWS, TEST_ROWS = 2000, 400

TUNING: Mapping[str, Any] = {
    "batch_size": 24,
    "learning_rate": 0.1,
    "adam_betas": [0.9, 0.99],
    "adam_epsilon": 0.01,  # larger than usual: coordinates that only see noise then stay where they are
    "weight_decay": 0.0,
    "schedule": "constant",
    "warmup_steps": 10,
    "clip_norm": 1.0,
    "stop_below": 0.03,  # an early stop keeps |T| small, and small vectors add up
    "max_target_tokens": 2,
}
SOURCE_RATE = 0.2  # in place of TUNING's: every source is learned well before its last step
SOURCE_STEPS, TARGET_STEPS = 300, 80


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to a target's prompt."""

    method: str
    """Its name in `tpv.methods`."""
    options: Mapping[str, Any]
    """What differs from TUNING and TARGET_STEPS."""
    datasets: bool = False
    """It reads the sources' data, too."""
    mixed: bool = False
    """Its one source is a prompt tuned on the mixed data of all."""


_SCALES = {"target_scale_learning_rate": 0.05, "source_scale_learning_rate": 0.05}
# Methods that train something else than a soft prompt next to a vector.
_WEIGHTS = {"adam_betas": [0.9, 0.999], "adam_epsilon": 1e-8, "stop_below": None}

CONTENDERS: Mapping[str, Contender] = {
    "prompt-tuning": Contender(method="prompt-tuning", options={}),
    # As many steps as both stages of a transfer may take together.
    "prompt-tuning-long": Contender(method="prompt-tuning", options={"steps": 2 * TARGET_STEPS, "stop_below": None}),
    "spot": Contender(method="spot", options={}),
    "tpv-sum": Contender(method="tpv-sum", options={}),
    "dtvg": Contender(method="dtvg", options=_SCALES),
    "dtvg-prefix": Contender(method="dtvg", options=_SCALES | {"strategy": "prefix"}),
    "dtvg-centered": Contender(method="dtvg", options=_SCALES | {"center": True}),
    "dtvg-prefix-centered": Contender(method="dtvg", options=_SCALES | {"strategy": "prefix", "center": True}),
    # Generic transfer: tuned on from one prompt for the sources together, which is the sum of one vector.
    "spot-multitask": Contender(method="tpv-sum", options={}, mixed=True),
    "attempt": Contender(method="attempt", options={}),
    "mpt": Contender(method="mpt", options={"source_steps": SOURCE_STEPS}, datasets=True),
    # With TUNING's epsilon the update of the embeddings would hardly move.
    "dept": Contender(method="dept", options={"prompt_tokens": 10, "rank": 8, "adam_epsilon": 1e-8}),
    "lora": Contender(method="lora", options=_WEIGHTS | {"learning_rate": 0.01}),
    "full": Contender(method="full", options=_WEIGHTS | {"learning_rate": 0.001}),
}
"""Every method of `tpv.methods`, by its name, and variants."""

DEFAULT_CONTENDERS = tuple(CONTENDERS)[:7]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """What one job reached, and at which cost; where it has two stages, of both."""

    accuracy: float
    """On the task's test rows."""
    target_steps: int
    cpu_seconds: float
    result: str | None
    """Reference of the vector."""
    group: list[str] | None = None
    """The source tasks in its group."""


@dataclass(frozen=True, kw_only=True)
class TargetFigures:
    majority: float
    """Accuracy of the training rows' most frequent answer."""
    methods: dict[str, Figure]
    """By contender."""


@dataclass(frozen=True, kw_only=True)
class SeedFigures:
    """What came out of one seed."""

    seed: int
    seconds: float
    """Wall time."""
    sources: dict[str, Figure]
    similarity: dict[str, list[list[float]]]
    """By metric: the sources against each other, in their order."""
    targets: dict[str, TargetFigures]


_Jobs = dict[tuple[Task | str, str], tpv.Job]


def run(
    client: tpv.Client,
    *,
    seed: int,
    shots: int,
    sources: Sequence[Task],
    targets: Sequence[Task],
    contenders: Collection[str],
    reference: Sequence[Task],
) -> SeedFigures:
    """Runs the lab once; the same seed gives the same vectors again, which the registry does not keep twice.

    `reference` are the tasks on whose vectors similarities are centred; none of them is a source or a target. They are
    tuned only if a contender centres.
    """
    started = time.monotonic()
    lab = _Lab(client, seed, shots)
    centred = any(CONTENDERS[name].options.get("center") for name in contenders)
    others = [name for name in contenders if name != "prompt-tuning"]
    first: _Jobs = {(task, "source"): lab.tune_source(task) for task in (*sources, *(reference if centred else ()))}
    first |= {(task, "prompt-tuning"): lab.start(task, "prompt-tuning", {}) for task in targets}
    mixing = any(CONTENDERS[name].mixed for name in contenders)
    if mixing:
        first["sources", "mixed"] = lab.tune_mixed(sources)
    _follow(first, f"seed {seed}: sources and the targets' own prompts")

    candidates = {task: str(first[task, "source"].result) for task in sources}
    mixed = {sources[0]: str(first["sources", "mixed"].result)} if mixing else {}
    pool = [str(first[task, "source"].result) for task in reference] if centred else []
    jobs: _Jobs = {}
    for task, name in itertools.product(targets, others):
        of = mixed if CONTENDERS[name].mixed else candidates
        jobs[task, name] = lab.start(task, name, of, str(first[task, "prompt-tuning"].result), pool)
    _follow(jobs, f"seed {seed}: everything else on the targets")

    similarity = {"cosine": client.similarity.matrix(candidates.values(), metric="cosine").matrix}
    if centred:
        centred_matrix = client.similarity.matrix(candidates.values(), metric="cosine-centered", reference_pool=pool)
        similarity["cosine-centered"] = centred_matrix.matrix
    jobs |= first
    return SeedFigures(
        seed=seed,
        seconds=time.monotonic() - started,
        sources={task.name: _figure(client, jobs[task, "source"], candidates) for task in sources},
        similarity=similarity,
        targets={
            task.name: TargetFigures(
                majority=jobs[task, "prompt-tuning"].metrics["test/majority"],
                methods={
                    name: _figure(
                        client,
                        jobs[task, name],
                        candidates,
                        first[task, "prompt-tuning"] if methods.METHODS[CONTENDERS[name].method].target else None,
                    )
                    for name in contenders
                },
            )
            for task in targets
        },
    )


class _Lab:
    """Starts the jobs of one seed."""

    def __init__(self, client: tpv.Client, seed: int, shots: int) -> None:
        self.client, self.seed, self.shots = client, seed, shots
        self.datasets: dict[Task, str] = {}
        self.initialization = client.initializations.create(
            f"{NAMESPACE}/fillers-{seed}",
            base_model=BASE_MODEL,
            revision=REVISION,
            num_virtual_tokens=NUM_VIRTUAL_TOKENS,
            strategy="random-vocab",
            top_k=N_COMMON,
            seed=seed,
            progress=True,
        )

    def name(self, task: Task) -> str:
        return f"{NAMESPACE}/{task.name}-{self.seed}"

    def dataset(self, task: Task) -> str:
        """The data set of a task, uploaded when it is first asked for."""
        if task not in self.datasets:
            uploaded = self.client.datasets.upload(
                self.name(task),
                train=training_rows(task, TRAIN_ROWS, 10 * self.seed),
                test=rows(task, TEST_ROWS, 10 * self.seed + 1),
                label_words=list(task.label_words),
            )
            self.datasets[task] = uploaded.reference
        return self.datasets[task]

    def tune_source(self, task: Task) -> tpv.Job:
        return self.client.jobs.tune(
            dataset=self.dataset(task),
            initialization=self.initialization,
            output=self.name(task),
            seed=self.seed,
            **{**TUNING, "learning_rate": SOURCE_RATE, "steps": SOURCE_STEPS, "evaluate_every": SOURCE_STEPS},
        )

    def tune_mixed(self, tasks: Sequence[Task]) -> tpv.Job:
        """One prompt for all tasks, whose vector is of no single one."""
        first, *others = map(self.dataset, tasks)
        return self.client.jobs.tune(
            method="spot-multitask",
            dataset=first,
            datasets=others,
            initialization=self.initialization,
            output=f"{NAMESPACE}/mixed-{self.seed}",
            seed=self.seed,
            **{**TUNING, "learning_rate": SOURCE_RATE, "steps": SOURCE_STEPS, "evaluate_every": SOURCE_STEPS},
        )

    def start(
        self,
        task: Task,
        contender: str,
        sources: Mapping[Task, str],
        own: str | None = None,
        pool: Sequence[str] = (),
    ) -> tpv.Job:
        """A contender's job on a target.

        `sources` are vectors by task, `own` is the target's, `pool` what similarities are centred on.
        """
        method, options = CONTENDERS[contender].method, CONTENDERS[contender].options
        facts = methods.METHODS[method]
        asked: dict[str, Any] = {
            "method": method,
            "dataset": self.dataset(task),
            "shots": self.shots,
            "shot_seed": self.seed,
            "seed": self.seed,
            **TUNING,
            "steps": TARGET_STEPS,
            **options,
        }
        if facts.result == "vector":
            asked["output"] = self.name(task) + ("" if contender == "prompt-tuning" else f"-{contender}")
        if CONTENDERS[contender].datasets:
            asked["datasets"] = [self.dataset(source) for source in sources]
        if not facts.sources:
            return self.client.jobs.tune(initialization=self.initialization, **asked)
        if facts.target:
            asked["target"] = own
        if options.get("center"):
            asked["reference_pool"] = pool
        return self.client.jobs.transfer(sources=[*sources.values()], **asked)


def _follow(jobs: _Jobs, what: str) -> None:
    """Waits for the jobs with one bar for all of them; raises JobFailed for the first one that does not succeed.

    Workers take them in this order, so it is enough to listen to one after the other.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[now]}"), console=Console(stderr=True)) as bars:
        bar = bars.add_task(what, total=len(jobs), now="")
        for (task, name), job in jobs.items():
            for event in job.events(follow=True):
                if event.type == "progress":
                    now = f"{task} {name}: step {event.data['step']}, loss {event.data['loss']:.3f}"
                    bars.update(bar, now=now)
            job.wait()
            bars.advance(bar)


def _figure(client: tpv.Client, job: tpv.Job, candidates: Mapping[Task, str], first: tpv.Job | None = None) -> Figure:
    """What a job reached; `first` is the stage before it."""
    group = None
    if job.method == "dtvg":
        names = {vector: task.name for task, vector in candidates.items()}
        group = [names[member] for member in client.vectors.get(str(job.result)).provenance["group"]]
    costs = [job.metrics, *([first.metrics] if first else [])]
    return Figure(
        accuracy=job.metrics["test/accuracy"],
        target_steps=int(sum(cost["target_steps"] for cost in costs)),
        cpu_seconds=sum(cost["cpu_seconds"] for cost in costs),
        result=job.result,
        group=group,
    )
