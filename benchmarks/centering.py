"""Does centring keep conflicting sources out of DTVG's groups, and does that help? On the lab's tasks.

    python benchmarks/centering.py [--seeds 0-9] [--shots 24] [--out centering.jsonl]

Vectors of one initialization have a part in common, so that even contrary tasks look similar; the option `center` of
`dtvg` takes the pooled vectors less the mean of a reference pool before Eq. 2. Some of what that does is arithmetic:
n vectors less their own mean have an average cosine of about -1/(n - 1), whatever they are. So four centres are
compared, with the same vectors, rows and seeds:

- `plain`: none;
- `reference`: the mean of the lab's 32 reference tasks, more than the candidates: both poles of every skill, in domains
  of their own;
- `own`: the mean of the candidates themselves;
- `random`: a random direction, as long as the reference centre.

Per seed: one initialization, the sources, the reference pool and each target's own vector, tuned as the lab does, then
one DTVG job for each target and centre. Everything runs in this process; about four CPU minutes a seed. A line of JSON
a seed is written; a second call goes on after the seeds that are there. Intervals are 95 %, over seeds (Student's t).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from tpv.methods import DtvgOptions, InitializeOptions, PromptTuningOptions
from tpv.similarity import cosine, pool
from tpv_worker import initialization
from tpv_worker.backbone import Backbone
from tpv_worker.data import Row, Task
from tpv_worker.evaluation import evaluate
from tpv_worker.lab import MODEL_DIRECTORY, world
from tpv_worker.lab.run import (
    NUM_VIRTUAL_TOKENS,
    SOURCE_RATE,
    SOURCE_STEPS,
    TARGET_STEPS,
    TEST_ROWS,
    TRAIN_ROWS,
    TUNING,
)
from tpv_worker.methods import Dtvg, Given, PromptTuning
from tpv_worker.training import train

CENTRES = ("plain", "reference", "own", "random")
KINDS = ("related", "unrelated", "conflicting")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--seeds", default="0-9", help="as 0-9 or 0,1,2")
    arguments.add_argument("--shots", type=int, default=24)
    arguments.add_argument("--source-steps", type=int, default=SOURCE_STEPS)
    arguments.add_argument("--out", type=Path, default=Path("centering.jsonl"))
    given = arguments.parse_args()
    torch.set_num_threads(1)

    first, _, last = given.seeds.partition("-")
    seeds = range(int(first), int(last) + 1) if last else [int(seed) for seed in given.seeds.split(",")]
    done = [json.loads(line) for line in given.out.read_text().splitlines()] if given.out.exists() else []
    for seed in seeds:
        if seed not in {result["seed"] for result in done}:
            done.append(Study(seed, given.shots, given.source_steps).run())
            with given.out.open("a") as file:
                file.write(json.dumps(done[-1]) + "\n")
    show([result for result in done if result["seed"] in seeds])


class Study:
    """All of one seed: it draws the initialization, the texts, the order of batches and the random direction."""

    def __init__(self, seed: int, shots: int, source_steps: int) -> None:
        self.seed, self.shots, self.source_steps = seed, shots, source_steps
        self.backbone = Backbone.load(MODEL_DIRECTORY)
        options = InitializeOptions(num_virtual_tokens=NUM_VIRTUAL_TOKENS, top_k=world.N_COMMON)
        self.P_init = initialization.draw(options, seed, self.backbone.embeddings, self.backbone.tokenizer)
        self.random = np.random.default_rng(seed)

    def run(self) -> dict[str, Any]:
        started = time.process_time()
        T_s = torch.stack([self.tune_source(task) for task in world.SOURCES])
        pooled = pool(T_s)  # (n, d)
        reference = pool(torch.stack([self.tune_source(task) for task in world.REFERENCE])).mean(0)
        direction = torch.from_numpy(self.random.standard_normal(len(reference))).float()
        centres = {
            "plain": None,
            "reference": reference,
            "own": pooled.mean(0),
            "random": direction * reference.norm() / direction.norm(),
        }
        targets = []
        for target in world.TARGETS:
            T_t = self.tune(target, self.shots, TARGET_STEPS, TUNING["learning_rate"])
            jobs = {name: self.transfer(target, T_t, T_s, centre) for name, centre in centres.items()}
            tuned = {"accuracy": self.accuracy(target, self.P_init + T_t)}
            targets.append({"target": target.name, "jobs": {"prompt-tuning": tuned, **jobs}})
        result = {
            "seed": self.seed,
            "candidates": len(T_s),
            "pool": len(world.REFERENCE),
            "cosines": {name: self.cosines(pooled, centre) for name, centre in centres.items()},
            "targets": targets,
            "cpu_seconds": time.process_time() - started,
        }
        print(f"seed {self.seed}: {result['cpu_seconds']:.0f} CPU s", flush=True)
        return result

    def tune_source(self, task: world.Task) -> Tensor:
        return self.tune(task, TRAIN_ROWS, self.source_steps, SOURCE_RATE)

    def tune(self, task: world.Task, rows: int, steps: int, rate: float) -> Tensor:
        """A task's own vector."""
        options = PromptTuningOptions(**TUNING | {"steps": steps, "evaluate_every": steps, "learning_rate": rate})
        given = Given(backbone=self.backbone, initialization=self.P_init)
        result = train(
            self.backbone, PromptTuning(options, given), [self.task(task, rows)], options=options, seed=self.seed
        )
        assert isinstance(result.snapshot.prompt, Tensor)
        return result.snapshot.prompt - self.P_init

    def transfer(self, target: world.Task, T_t: Tensor, T_s: Tensor, centre: Tensor | None) -> dict[str, Any]:
        options = DtvgOptions(
            **{**TUNING, "steps": TARGET_STEPS, "evaluate_every": TARGET_STEPS},
            target_scale_learning_rate=0.05,
            source_scale_learning_rate=0.05,
            center=centre is not None,
        )
        given = Given(backbone=self.backbone, initialization=self.P_init, target=T_t, sources=T_s, center=centre)
        method = Dtvg(options, given)
        at_first = method.members
        result = train(self.backbone, method, [self.task(target, self.shots)], options=options, seed=self.seed)
        assert isinstance(result.snapshot.prompt, Tensor)

        def kinds(members: tuple[int, ...]) -> list[str]:
            return [world.relatedness(target, world.SOURCES[i]) for i in members]

        return {
            "accuracy": self.accuracy(target, result.snapshot.prompt),
            "first_group": kinds(at_first),
            "group": kinds(result.snapshot.members or ()),
        }

    def task(self, task: world.Task, rows: int) -> Task:
        found = world.training_rows(task, rows, 10 * self.seed)
        return Task(train=[Row(**row) for row in found], label_words=task.label_words)

    def accuracy(self, task: world.Task, prompt: Tensor) -> float:
        options = PromptTuningOptions(**TUNING)
        rows = [Row(**row) for row in world.rows(task, TEST_ROWS, 10 * self.seed + 1)]
        examples = self.backbone.tokenize(rows, options, len(prompt))
        return evaluate(self.backbone, prompt, examples, label_words=task.label_words, options=options).value

    @staticmethod
    def cosines(pooled: Tensor, centre: Tensor | None) -> dict[str, list[float]]:
        """Of all pairs of sources, by what is known of them."""
        vectors = pooled if centre is None else pooled - centre
        found = cosine(vectors, vectors)
        pairs = defaultdict(list)
        for i, j in itertools.combinations(range(len(vectors)), 2):
            pairs[world.relatedness(world.SOURCES[i], world.SOURCES[j])].append(float(found[i, j]))
        return pairs


def show(results: list[dict[str, Any]]) -> None:
    n = results[0]["candidates"]
    print(f"\nCosines of the {n} sources, means over {len(results)} seeds; -1/(n - 1) is {-1 / (n - 1):.3f}")
    print(f"{'centre':14}" + "".join(f"{kind:>14}" for kind in KINDS) + f"{'all pairs':>14}{'contrary < 0':>14}")
    for name in CENTRES:
        pairs = {kind: [c for result in results for c in result["cosines"][name].get(kind, ())] for kind in KINDS}
        every = [value for values in pairs.values() for value in values]
        means = [statistics.fmean(values) if values else float("nan") for values in [*pairs.values(), every]]
        negative = statistics.fmean(value < 0 for value in pairs["conflicting"]) if pairs["conflicting"] else 0.0
        print(f"{name:14}" + "".join(f"{mean:14.3f}" for mean in means) + f"{negative:14.0%}")

    print("\nGroups: share of those that hold a conflicting source, of the targets that have one; how many are related")
    print(f"{'centre':14}{'at first':>14}{'at last':>14}{'size':>14}{'related':>14}")
    for name in CENTRES:
        jobs = [target["jobs"][name] for result in results for target in result["targets"]]
        contrary = [target["jobs"][name] for result in results for target in result["targets"] if has_conflict(target)]
        shares = [statistics.fmean("conflicting" in job[key] for job in contrary) for key in ("first_group", "group")]
        sizes = [len(job["group"]) for job in jobs]
        related = sum(job["group"].count("related") for job in jobs) / max(1, sum(sizes))
        print(f"{name:14}{shares[0]:14.0%}{shares[1]:14.0%}{statistics.fmean(sizes):14.2f}{related:14.0%}")

    print("\nAccuracy on the targets' test rows, mean of the targets; difference to `plain`, paired by seed")
    print(f"{'job':14}{'mean':>14}{'sd of seeds':>14}{'difference':>14}{'95 % interval':>20}")
    plain = by_seed(results, "plain")
    for name in ("prompt-tuning", *CENTRES):
        values = by_seed(results, name)
        differences = [a - b for a, b in zip(values, plain, strict=True)]
        low, high = interval(differences)
        print(
            f"{name:14}{statistics.fmean(values):14.1%}{spread(values):14.1%}"
            f"{100 * statistics.fmean(differences):+14.1f}{f'{100 * low:+.1f} to {100 * high:+.1f}':>20}"
        )


def has_conflict(target: dict[str, Any]) -> bool:
    task = world.task_named(target["target"])
    return any(world.relatedness(task, source) == "conflicting" for source in world.SOURCES)


def by_seed(results: list[dict[str, Any]], name: str) -> list[float]:
    return [statistics.fmean(target["jobs"][name]["accuracy"] for target in result["targets"]) for result in results]


def spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def interval(differences: list[float]) -> tuple[float, float]:
    """Student's 95 % interval of the mean; one value has none."""
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return mean, mean
    half = float(stats.t.ppf(0.975, len(differences) - 1)) * spread(differences) / len(differences) ** 0.5
    return mean - half, mean + half


if __name__ == "__main__":
    main()
