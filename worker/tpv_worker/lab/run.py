"""The lab: from an empty registry to finished DTVG transfers, on tasks whose relatedness is known by construction.

It goes through the product as any user does: it uploads data sets, has workers draw the initialization and tune the
sources, then runs each target's transfers, and reads the figures off the registry.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import tpv
from tpv.schemas.jobs import Job
from tpv_worker.lab import BASE_MODEL, REVISION
from tpv_worker.lab.world import N_COMMON, SOURCES, TARGETS, Task, relatedness, rows, task_named

NAMESPACE = "lab"
NUM_VIRTUAL_TOKENS = 20
ROWS = (2000, 200, 400)  # to train, to validate, to test

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
SOURCE_STEPS, TARGET_STEPS = 300, 80


@dataclass(frozen=True, kw_only=True)
class TargetResult:
    """What came out for one target, as accuracies on its test split."""

    target: Task
    majority: float
    prompt_tuning: float
    prompt_tuning_long: float  #: with as many steps at most as both stages of DTVG together
    dtvg: float
    steps: Mapping[str, float]  #: target steps run, by method
    cpu_seconds: Mapping[str, float]
    group: Mapping[str, str]  #: source in the group of the best step -> its relatedness


def run(
    client: tpv.Client, *, sources: Iterable[Task] = SOURCES, targets: Iterable[Task] = TARGETS, seed: int, shots: int
) -> list[TargetResult]:
    """Runs the example of one seed; what the registry has already is found again, not made twice."""
    initialization = client.initializations.create(
        f"{NAMESPACE}/fillers-{seed}",
        base_model=BASE_MODEL,
        revision=REVISION,
        num_virtual_tokens=NUM_VIRTUAL_TOKENS,
        strategy="random-vocab",
        top_k=N_COMMON,
        seed=seed,
        progress=True,
    )
    names = []
    jobs = []
    for task in sources:
        names.append(_name(task, seed))
        jobs.append(
            client.jobs.tune(
                dataset=_upload(client, task, seed),
                initialization=initialization,
                output=names[-1],
                seed=seed,
                steps=SOURCE_STEPS,
                evaluate_every=100,
                **TUNING,
            )
        )
    client.jobs.wait_all(jobs, progress=True)

    chosen = list(targets)
    started = [_start_target(client, task, initialization, names, seed=seed, shots=shots) for task in chosen]
    client.jobs.wait_all([job for jobs_of_target in started for job in jobs_of_target], progress=True)
    return [_result(client, task, *jobs_of_target) for task, jobs_of_target in zip(chosen, started, strict=True)]


def _start_target(
    client: tpv.Client, task: Task, initialization: Any, sources: list[str], *, seed: int, shots: int
) -> tuple[tpv.Job, tpv.Job, tpv.Job]:
    """Prompt tuning, the same with the steps of both stages, and DTVG, all on the same few rows."""
    dataset, name = _upload(client, task, seed), _name(task, seed)
    few: dict[str, Any] = {"dataset": dataset, "shots": shots, "shot_seed": seed, "seed": seed}
    options: dict[str, Any] = {"evaluate_every": 2 * TARGET_STEPS, **TUNING}  # few-shot: the last step is taken
    first = {**options, "steps": TARGET_STEPS}
    plain = client.jobs.tune(initialization=initialization, output=name, **few, **first)
    unstopped = {**options, "stop_below": None}
    long = client.jobs.tune(
        initialization=initialization, output=f"{name}-long", steps=2 * TARGET_STEPS, **few, **unstopped
    )
    dtvg = client.jobs.transfer(
        method="dtvg",
        target=name,
        target_options=first,  # as above: the transfer waits for that job instead of tuning the target once more
        sources=sources,
        output=f"{name}-dtvg",
        steps=TARGET_STEPS,
        target_scale_learning_rate=0.05,
        source_scale_learning_rate=0.05,
        **few,
        **options,
    )
    return plain, long, dtvg


def _upload(client: tpv.Client, task: Task, seed: int) -> str:
    train, validation, test = (rows(task, n, 10 * seed + i) for i, n in enumerate(ROWS))
    words = list(task.label_words)
    return client.datasets.upload(
        _name(task, seed), train=train, validation=validation, test=test, label_words=words
    ).reference


def _name(task: Task, seed: int) -> str:
    return f"{NAMESPACE}/{task.name}-{seed}"


def _result(client: tpv.Client, task: Task, plain: Job, long: Job, dtvg: Job) -> TargetResult:
    jobs = {"prompt-tuning": plain, "prompt-tuning-long": long, "dtvg": dtvg}
    provenance = client.vectors.get(str(dtvg.result)).provenance
    members = [task_named(reference.split("/")[1].rpartition("-")[0]) for reference in provenance["group"]]
    return TargetResult(
        target=task,
        majority=plain.metrics["test/majority"],
        prompt_tuning=plain.metrics["test/accuracy"],
        prompt_tuning_long=long.metrics["test/accuracy"],
        dtvg=dtvg.metrics["test/accuracy"],
        steps={name: job.metrics["target_steps"] for name, job in jobs.items()},
        cpu_seconds={name: job.metrics["cpu_seconds"] for name, job in jobs.items()},
        group={member.name: relatedness(task, member) for member in members},
    )
