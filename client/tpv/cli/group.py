"""`tpv group`: which source tasks help a target together."""

from __future__ import annotations

from typing import Annotated

import typer

from tpv.cli.options import Json, Namespace, Versions, connect, pairs
from tpv.cli.output import Output, plain
from tpv.cli.similarity import MixedOption, SameTask, TagOption, TaskOption, TaskTypeOption, pool_line
from tpv.grouping import Strategy


def group(
    context: typer.Context,
    target: Annotated[str, typer.Argument(help="The vector of the task that is to be helped.")],
    candidates: Annotated[
        list[str] | None, typer.Argument(help="Source vectors to choose from; none: all that pass the filters.")
    ] = None,
    strategy: Annotated[Strategy, typer.Option(help="How the group is chosen.")] = "greedy",
    trade_off: Annotated[
        float | None, typer.Option(min=0, help="Weight of knowledge consistency, for the strategy exact and --compare.")
    ] = None,
    max_size: Annotated[int | None, typer.Option(min=0, help="Members at most.")] = None,
    min_similarity: Annotated[float | None, typer.Option(help="Instead of the strategy's own bound.")] = None,
    task: TaskOption = None,
    task_type: TaskTypeOption = None,
    namespace: Namespace = None,
    tag: TagOption = None,
    versions: Versions = None,
    allow_same_task: SameTask = False,
    allow_mixed_initializations: MixedOption = False,
    compare: Annotated[bool, typer.Option("--compare", help="Also what every other strategy would choose.")] = False,
    full: Annotated[bool, typer.Option("--all", help="Show every decision, also of a large pool.")] = False,
    as_json: Json = False,
) -> None:
    """Chooses the group of source tasks for a target, and shows every decision."""
    with connect(context) as client:
        answer = client.groupings.create(
            target,
            candidates or None,
            strategy=strategy,
            trade_off=trade_off,
            max_size=max_size,
            min_similarity=min_similarity,
            task=task,
            task_type=task_type,
            namespace=namespace,
            tags=pairs(tag, option="--tag") or None,
            versions=versions,
            allow_same_task=allow_same_task or None,
            allow_mixed_initializations=allow_mixed_initializations or None,
            compare=compare or None,
            trace="all" if full else None,
        )
    out = Output(as_json)
    if as_json:
        out.json(answer)
        return
    out.table(
        [],
        ["", "vector", "similarity", "KC before", "KC after", "taken", "why"],
        ([t.rank + 1, plain(t.reference), t.similarity, t.consistency_before, t.consistency_after, t.taken, t.reason]
         for t in answer.trace),
        empty=f"no vector to group for {plain(answer.target)}",
    )  # fmt: skip
    if answer.trace_total > len(answer.trace):
        out.note(f"{len(answer.trace)} of {answer.trace_total} decisions are shown; all: --all")
    members = " + ".join(plain(member.reference) for member in answer.members) or "empty"
    out.note(f"group for {plain(answer.target)}: {members}")
    out.note(
        f"target similarity {answer.target_similarity:.4g}, knowledge consistency {answer.knowledge_consistency:.4g}, "
        f"objective {answer.objective:.4g}"
    )
    if answer.comparison is not None:
        out.table(
            [],
            ["strategy", "members", "target similarity", "knowledge consistency", "objective", "group"],
            (
                [other.strategy, other.size, other.target_similarity, other.knowledge_consistency, other.objective,
                 other.refused or " + ".join(plain(member) for member in other.members[:10])]
                for other in answer.comparison
            ),
        )  # fmt: skip
    out.note(pool_line(answer.pool))
