"""What the lab prints: tables of one seed's figures, or of means over several."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import fmean, stdev

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from tpv_worker.lab.run import Figure, SeedFigures
from tpv_worker.lab.world import relatedness, task_named

STYLES = {"related": "green", "unrelated": "", "conflicting": "red"}
MARKS = {"related": " =", "unrelated": "", "conflicting": " ≠"}  # what is known, where there are no colours


def of_target(seeds: Sequence[SeedFigures], target: str) -> Table:
    """Accuracy, costs and groups on one target, a line a method."""
    table = _table(target, "accuracy", "target steps", "CPU s", "sources in the group")
    figures = [seed.targets[target] for seed in seeds]
    table.add_row("majority", _share([each.majority for each in figures]), "0", "", "")
    for method in figures[0].methods:
        found = [each.methods[method] for each in figures]
        table.add_row(
            method,
            _share([figure.accuracy for figure in found]),
            f"{fmean(figure.target_steps for figure in found):.0f}",
            f"{fmean(figure.cpu_seconds for figure in found):.1f}",
            _groups(target, found),
        )
    return table


def of_all(seeds: Sequence[SeedFigures]) -> Table:
    """Means over the targets, and what the groups held, a line a method."""
    table = _table("mean of the targets", "accuracy", "target steps", "CPU s", "groups with a known conflict")
    cells = [(name, figures) for seed in seeds for name, figures in seed.targets.items()]
    of_seed = [fmean(figures.majority for figures in seed.targets.values()) for seed in seeds]
    table.add_row("majority", _share(of_seed), "0", "", "")
    for method in cells[0][1].methods:
        found = [(target, figures.methods[method]) for target, figures in cells]
        of_seed = [fmean(target.methods[method].accuracy for target in seed.targets.values()) for seed in seeds]
        conflicts = [
            _conflict(target, figure.group)
            for target, figure in found
            if figure.group is not None and _conflict(target, seeds[0].sources)
        ]
        table.add_row(
            method,
            _share(of_seed),
            f"{fmean(figure.target_steps for _, figure in found):.0f}",
            f"{fmean(figure.cpu_seconds for _, figure in found):.1f}",
            f"{sum(conflicts)} of {len(conflicts)} that could hold one" if conflicts else "",
        )
    return table


def of_similarity(seeds: Sequence[SeedFigures], metric: str) -> Table:
    """The sources against each other, each pair with what is known of it."""
    names = [*seeds[0].sources]
    table = Table(title=f"{metric} of the sources' vectors; = related, ≠ conflicting tasks")
    table.add_column("")
    for i in range(1, len(names)):
        table.add_column(str(i), justify="right")
    for i, name in enumerate(names):
        values = [
            _known(f"{fmean(seed.similarity[metric][i][j] for seed in seeds):.2f}", _relation(name, names[j]))
            for j in range(i)
        ]
        table.add_row(f"{i + 1} {name}", *values)
    return table


def on_similarity(seeds: Sequence[SeedFigures], metric: str) -> str:
    """Its means by what is known of the pairs, and how well it tells related from unrelated ones."""
    values: dict[str, list[float]] = {"related": [], "unrelated": [], "conflicting": []}
    above: list[float] = []
    for seed in seeds:
        names, of_seed = [*seed.sources], {relation: list[float]() for relation in values}
        for i, name in enumerate(names):
            for j in range(i):
                of_seed[_relation(name, names[j])].append(seed.similarity[metric][i][j])
        above += [related > unrelated for related in of_seed["related"] for unrelated in of_seed["unrelated"]]
        for relation, more in of_seed.items():
            values[relation] += more
    means = ", ".join(f"{relation} pairs {fmean(some):.2f}" for relation, some in values.items() if some)
    says = f"; a related pair is above an unrelated one in {fmean(above):.1%} of all cases" if above else ""
    return f"mean {metric}: {means}{says}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    table.add_column("method")
    for column in columns:
        table.add_column(column, justify="left" if "group" in column else "right")
    return table


def _share(values: Sequence[float]) -> str:
    return f"{fmean(values):.1%}" + (f" ± {100 * stdev(values):.1f}" if len(values) > 1 else "")


def _groups(target: str, figures: Sequence[Figure]) -> RenderableType:
    """The members of a group, with what is known of them; of several groups, how often each source was in one."""
    groups = [figure.group for figure in figures if figure.group is not None]
    if not groups:
        return ""
    counts = Counter(member for group in groups for member in group)
    times = {member: f" {count}/{len(groups)}" if len(groups) > 1 else "" for member, count in counts.most_common()}
    members = [_known(member + times[member], _relation(target, member)) for member in times]
    return Text(", ").join(members) if members else "nobody"


def _known(text: str, relation: str) -> Text:
    return Text(text + MARKS[relation], STYLES[relation])


def _conflict(target: str, sources: Iterable[str]) -> bool:
    return any(_relation(target, source) == "conflicting" for source in sources)


def _relation(a: str, b: str) -> str:
    return relatedness(task_named(a), task_named(b))
