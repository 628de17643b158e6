"""What a study with the lab found, as the Markdown tables of docs/guides/lab.md.

    tpv lab run --seeds 100-109 --methods all --targets all --sources all --json study.json
    python -m benchmarks.lab study.json [another.json ...]

Files are taken together: each has seeds or methods of its own, and the same tasks. Values are in %; intervals are 95 %,
over the seeds that a method has run with (Student's t), and one seed has none; differences are paired by seed.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.centering import KINDS, interval, spread

from tpv_worker.lab.world import relatedness, task_named

BASES = ("prompt-tuning", "prompt-tuning-long", "spot", "tpv-sum")
COSTS = (("target_steps", 0), ("cpu_seconds", 1))

Seed = dict[str, Any]
BySeed = Mapping[int, float]


def main() -> None:
    seeds = merged(json.loads(Path(path).read_text()) for path in sys.argv[1:])
    targets = list(seeds[0]["targets"])
    methods = {"majority": None, **seeds[0]["targets"][targets[0]]["methods"]}
    grouped = [method for method, figure in methods.items() if figure and figure["group"] is not None]

    print(f"Seeds: {', '.join(str(seed['seed']) for seed in seeds)}\n\nMean (sd; half the interval)\n")
    show(["", *targets], [[method, *(cell(accuracies(seeds, [t], method)) for t in targets)] for method in methods])

    print("Mean of the targets, and differences to it with their intervals\n")
    columns = ["seeds", "mean", "sd", "interval", *(f"minus `{base}`" for base in BASES), "target steps", "CPU s"]
    show(["", *columns], [[method, *line(seeds, targets, method)] for method in methods])

    for method in grouped:
        print(f"`{method}` on each target\n")
        rows = []
        for target in targets:
            values, *bases = (accuracies(seeds, [target], name) for name in (method, *BASES))
            rows.append([target, *(difference(values, base) for base in bases)])
        show(["", *(f"minus `{base}`" for base in BASES)], rows)

    print("Groups\n")
    columns = ["hold a known conflict", "could hold one", "members", "of them related", "unrelated", "conflicting"]
    show(["", *columns], [[method, *groups(seeds, method)] for method in grouped])

    for metric in seeds[0]["similarity"]:
        print(f"`{metric}` of two sources: {similarities(seeds, metric)}\n")
    sources = [source for seed in seeds for source in seed["sources"].values()]
    print(
        f"Sources: mean {fmean(source['accuracy'] for source in sources):.1%}, "
        f"least {min(source['accuracy'] for source in sources):.1%}, "
        f"at most {max(source['target_steps'] for source in sources)} steps and "
        f"{max(source['cpu_seconds'] for source in sources):.1f} CPU s"
    )


def merged(files: Iterable[Mapping[str, Any]]) -> list[Seed]:
    """The seeds of all files, each with all its methods; one that has them all comes first."""
    seeds: dict[int, Seed] = {}
    for part in itertools.chain.from_iterable(file["seeds"] for file in files):
        seed = seeds.setdefault(part["seed"], part)
        seed["similarity"] |= part["similarity"]
        for target, found in part["targets"].items():
            seed["targets"][target]["methods"] |= found["methods"]
    return sorted(seeds.values(), key=lambda seed: -len(next(iter(seed["targets"].values()))["methods"]))


def accuracies(seeds: Sequence[Seed], targets: Sequence[str], method: str) -> BySeed:
    """The method's accuracy, mean of the targets, by seed."""

    def accuracy(found: Any) -> float:
        return 100 * float(found["majority"] if method == "majority" else found["methods"][method]["accuracy"])

    ran = [seed for seed in seeds if method in ("majority", *seed["targets"][targets[0]]["methods"])]
    return {seed["seed"]: fmean(accuracy(seed["targets"][target]) for target in targets) for seed in ran}


def cell(values: BySeed) -> str:
    low, high = interval([*values.values()])
    spreads = f" ({spread([*values.values()]):.1f}; {(high - low) / 2:.1f})" if len(values) > 1 else ""
    return f"{fmean(values.values()):.1f}{spreads}"


def line(seeds: Sequence[Seed], targets: Sequence[str], method: str) -> Iterator[str]:
    values = accuracies(seeds, targets, method)
    low, high = interval([*values.values()])
    yield from (str(len(values)), f"{fmean(values.values()):.1f}")
    yield from (f"{spread([*values.values()]):.1f}", f"{low:.1f} to {high:.1f}") if len(values) > 1 else ("", "")
    for base in BASES:
        yield "" if base == method else difference(values, accuracies(seeds, targets, base))
    figures = [seed["targets"][target]["methods"].get(method) for seed in seeds for target in targets]
    for key, digits in COSTS:
        costs = [figure[key] for figure in figures if figure]
        yield f"{fmean(costs):.{digits}f}" if costs else ""


def difference(values: BySeed, base: BySeed) -> str:
    differences = [values[seed] - base[seed] for seed in values.keys() & base.keys()]
    low, high = interval(differences)
    return f"{fmean(differences):+.1f}" + (f" ({low:+.1f} to {high:+.1f})" if len(differences) > 1 else "")


def groups(seeds: Sequence[Seed], method: str) -> list[str]:
    kinds, holding = [], []
    for seed in seeds:
        for target, found in seed["targets"].items():
            if method in found["methods"]:
                kinds.append([relation(target, member) for member in found["methods"][method]["group"]])
                if any(relation(target, source) == "conflicting" for source in seed["sources"]):
                    holding.append("conflicting" in kinds[-1])
    members = [kind for group in kinds for kind in group]
    shares = [f"{members.count(kind) / max(1, len(members)):.0%}" for kind in KINDS]
    conflicts = f"{sum(holding)} ({fmean(holding):.0%})" if holding else ""
    return [conflicts, str(len(holding)), f"{len(members) / len(kinds):.1f}", *shares]


def similarities(seeds: Sequence[Seed], metric: str) -> str:
    values: dict[str, list[float]] = {kind: [] for kind in KINDS}
    above = []
    for seed in seeds:
        if metric in seed["similarity"]:
            of_seed: dict[str, list[float]] = {kind: [] for kind in KINDS}
            for (i, a), (j, b) in itertools.combinations(enumerate(seed["sources"]), 2):
                of_seed[relation(a, b)].append(seed["similarity"][metric][i][j])
            above.append(fmean(a > b for a in of_seed["related"] for b in of_seed["unrelated"]))
            values = {kind: [*values[kind], *of_seed[kind]] for kind in KINDS}
    means = [f"{kind} {fmean(some):.2f} (sd {spread(some):.2f})" for kind, some in values.items() if some]
    return f"{', '.join(means)}; P(related > unrelated) {fmean(above):.3f}, least of a seed {min(above):.3f}"


def relation(a: str, b: str) -> str:
    return relatedness(task_named(a), task_named(b))


def show(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a Markdown table."""
    for row in (columns, ["---"] * len(columns), *rows):
        print("| " + " | ".join(row) + " |")
    print()


if __name__ == "__main__":
    main()
