"""`tpv group`: which source tasks help a target together."""

from __future__ import annotations

from typing import Annotated

import typer

from tpv.cli.options import Json, Namespace, connect
from tpv.cli.output import Output, plain
from tpv.cli.similarity import SameTask, TaskOption, TaskTypeOption, pool_line


def group(
    context: typer.Context,
    target: Annotated[str, typer.Argument(help="The vector of the task that is to be helped.")],
    candidates: Annotated[
        list[str] | None, typer.Argument(help="Source vectors to choose from; none: all that pass the filters.")
    ] = None,
    strategy: Annotated[str | None, typer.Option(help="Grouping strategy; default greedy.")] = None,
    max_size: Annotated[int | None, typer.Option(min=0, help="Members at most.")] = None,
    min_similarity: Annotated[float | None, typer.Option(help="Instead of the strategy's own bound.")] = None,
    task: TaskOption = None,
    task_type: TaskTypeOption = None,
    namespace: Namespace = None,
    allow_same_task: SameTask = False,
    as_json: Json = False,
) -> None:
    """Chooses the group of source tasks for a target, and shows every decision."""
    with connect(context) as client:
        answer = client.groupings.create(
            target,
            candidates or None,
            strategy=strategy,
            max_size=max_size,
            min_similarity=min_similarity,
            task=task,
            task_type=task_type,
            namespace=namespace,
            allow_same_task=allow_same_task or None,
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
    members = " + ".join(plain(member.reference) for member in answer.members) or "empty"
    out.note(f"group for {plain(answer.target)}: {members}")
    out.note(
        f"target similarity {answer.target_similarity:.4g}, knowledge consistency {answer.knowledge_consistency:.4g}, "
        f"objective {answer.objective:.4g}"
    )
    out.note(pool_line(answer.pool))
