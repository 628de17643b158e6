"""What a study with the lab found, as the Markdown tables of docs/guides/lab.md.

    tpv lab run --seeds 100-109 --methods all --targets all --sources all --json study.json
    python -m benchmarks.lab study.json [another.json ...]

Files are taken together: each has seeds of its own and the same tasks. Intervals are 95 %, over seeds (Student's t);
differences are paired by seed.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.centering import interval, spread

from tpv_worker.lab.world import relatedness, task_named

BASES = ("prompt-tuning", "prompt-tuning-long", "spot", "tpv-sum")

Seed = dict[str, Any]


def main() -> None:
    seeds = [seed for path in sys.argv[1:] for seed in json.loads(Path(path).read_text())["seeds"]]
    targets = list(seeds[0]["targets"])
    first = seeds[0]["targets"][targets[0]]["methods"]
    methods = ["majority", *first]
    grouped = [method for method in first if first[method]["group"] is not None]

    print(
        f"Seeds: {', '.join(str(seed['seed']) for seed in seeds)}. A cell is mean (sd; half the 95 % interval) in %.\n"
    )
    show(["method", *targets], [[method, *(cell(of(seeds, [t], method)) for t in targets)] for method in methods])

    columns = ["mean", "sd", "95 %", *(f"minus `{base}`" for base in BASES), "target steps", "CPU s"]
    show(["method", *columns], [[method, *mean_of_targets(seeds, targets, method)] for method in methods])

    pairs = [(method, base) for method in grouped for base in BASES]
    show(
        ["target", *(f"`{method}` minus `{base}`" for method, base in pairs)],
        [[t, *(difference(of(seeds, [t], method), of(seeds, [t], base)) for method, base in pairs)] for t in targets],
    )
    show(
        ["method", "groups that hold a known conflict", "of those that could", "size", "related", "conflicting"],
        [[method, *groups(seeds, method)] for method in grouped],
    )
    for metric in seeds[0]["similarity"]:
        show([metric, "mean", "sd", "least", "greatest"], similarities(seeds, metric))
        print(on_similarity_of(seeds, metric) + "\n")
    sources = [source for seed in seeds for source in seed["sources"].values()]
    accuracies = [source["accuracy"] for source in sources]
    print(
        f"Sources: mean {fmean(accuracies):.1%}, least {min(accuracies):.1%}, "
        f"at most {max(source['target_steps'] for source in sources)} steps and "
        f"{max(source['cpu_seconds'] for source in sources):.1f} CPU s. "
        f"Wall time of a seed: {fmean(seed['seconds'] for seed in seeds):.0f} s."
    )


def mean_of_targets(seeds: Sequence[Seed], targets: Sequence[str], method: str) -> list[str]:
    values = of(seeds, targets, method)
    low, high = interval(values)
    differences = ["" if base == method else difference(values, of(seeds, targets, base)) for base in BASES]
    costs = [seed["targets"][target]["methods"].get(method) for seed in seeds for target in targets]
    spent = [f"{fmean(cost[key] for cost in costs):.{digits}f}" if costs[0] else "" for key, digits in COSTS]
    shown = [f"{100 * fmean(values):.1f}", f"{100 * spread(values):.1f}", f"{100 * low:.1f} to {100 * high:.1f}"]
    return [*shown, *differences, *spent]


COSTS = (("target_steps", 0), ("cpu_seconds", 1))


def of(seeds: Sequence[Seed], targets: Sequence[str], method: str) -> list[float]:
    """A value a seed: the method's accuracy, mean of the targets."""
    found = [[seed["targets"][target] for target in targets] for seed in seeds]
    return [
        fmean(t["majority"] if method == "majority" else t["methods"][method]["accuracy"] for t in f) for f in found
    ]


def cell(values: Sequence[float]) -> str:
    low, high = interval(list(values))
    return f"{100 * fmean(values):.1f} ({100 * spread(list(values)):.1f}; {50 * (high - low):.1f})"


def difference(values: Sequence[float], base: Sequence[float]) -> str:
    differences = [a - b for a, b in zip(values, base, strict=True)]
    low, high = interval(differences)
    return f"{100 * fmean(differences):+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def groups(seeds: Sequence[Seed], method: str) -> list[str]:
    kinds = []
    could = []
    for seed in seeds:
        for target, found in seed["targets"].items():
            kinds.append([relation(target, member) for member in found["methods"][method]["group"]])
            if any(relation(target, source) == "conflicting" for source in seed["sources"]):
                could.append("conflicting" in kinds[-1])
    members = [kind for group in kinds for kind in group]
    return [
        f"{sum(could)} ({fmean(could):.0%})" if could else "",
        str(len(could)),
        f"{len(members) / len(kinds):.1f}",
        *(f"{members.count(kind) / max(1, len(members)):.0%} of the members" for kind in ("related", "conflicting")),
    ]


def similarities(seeds: Sequence[Seed], metric: str) -> Iterator[list[str]]:
    found = [pairs_of(seed, metric) for seed in seeds]
    for kind in ("related", "unrelated", "conflicting"):
        values = [value for pairs in found for value in pairs[kind]]
        yield [kind, *(f"{value:.2f}" for value in (fmean(values), spread(values), min(values), max(values)))]


def on_similarity_of(seeds: Sequence[Seed], metric: str) -> str:
    found = [pairs_of(seed, metric) for seed in seeds]
    above = [
        {kind: fmean(a > b for a in pairs["related"] for b in pairs[kind]) for kind in ("unrelated", "conflicting")}
        for pairs in found
    ]
    shares = [f"{kind} one in {fmean(share[kind] for share in above):.1%}" for kind in above[0]]
    return f"Of a seed's pairs, a related one is above an {' and above a '.join(shares)} of all cases."


def pairs_of(seed: Seed, metric: str) -> dict[str, list[float]]:
    """The sources' similarities, by what is known of the pair."""
    pairs: dict[str, list[float]] = {"related": [], "unrelated": [], "conflicting": []}
    for (i, a), (j, b) in itertools.combinations(enumerate(seed["sources"]), 2):
        pairs[relation(a, b)].append(seed["similarity"][metric][i][j])
    return pairs


def relation(a: str, b: str) -> str:
    return relatedness(task_named(a), task_named(b))


def show(columns: Sequence[str], rows: Any) -> None:
    """Prints a Markdown table."""
    for row in (columns, ["---"] * len(columns), *rows):
        print("| " + " | ".join(row) + " |")
    print()


if __name__ == "__main__":
    main()
