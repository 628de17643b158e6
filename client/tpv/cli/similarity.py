"""`tpv similarity`: how close tasks are, by their vectors."""

from __future__ import annotations

from typing import Annotated

import typer

from tpv.cli.options import Json, Namespace, connect
from tpv.cli.output import Output, plain
from tpv.schemas.similarity import PoolEcho

app = typer.Typer(help="How close tasks are, by their vectors.", no_args_is_help=True)

CandidateOptions = Annotated[
    list[str] | None, typer.Option("--candidate", "-c", help="Only these vectors; repeatable. None: all that pass.")
]
TaskOption = Annotated[str | None, typer.Option(help="Only vectors of this task.")]
TaskTypeOption = Annotated[str | None, typer.Option(help="Only vectors of this task type.")]
SameTask = Annotated[bool, typer.Option("--allow-same-task", help="Also vectors of the same task.")]


@app.command("search")
def search(
    context: typer.Context,
    query: Annotated[str, typer.Argument(help="The vector to compare with.")],
    k: Annotated[int, typer.Option("-k", "--k", min=1, max=1000, help="Hits at most.")] = 10,
    candidates: CandidateOptions = None,
    task: TaskOption = None,
    task_type: TaskTypeOption = None,
    namespace: Namespace = None,
    allow_same_task: SameTask = False,
    as_json: Json = False,
) -> None:
    """Finds the vectors most similar to one."""
    with connect(context) as client:
        answer = client.similarity.search(
            query,
            k,
            candidates=candidates or None,
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
        ["", "vector", answer.pool.metric, "tasks", "type"],
        ([rank, plain(h.reference), h.similarity, h.tasks, h.task_type] for rank, h in enumerate(answer.hits, 1)),
        empty=f"no vector to compare {plain(answer.query)} with",
    )
    out.note(pool_line(answer.pool))


@app.command("matrix")
def matrix(
    context: typer.Context,
    references: Annotated[list[str], typer.Argument(help="The vectors to compare.")],
    as_json: Json = False,
) -> None:
    """Compares vectors, each with each."""
    with connect(context) as client:
        answer = client.similarity.matrix(references)
    out = Output(as_json)
    if as_json:
        out.json(answer)
        return
    names = [plain(reference) for reference in answer.references]
    rows = ([name, *row] for name, row in zip(names, answer.matrix, strict=True))
    out.table([], [answer.metric, *names], rows)


def pool_line(pool: PoolEcho) -> str:
    """What a query looked at, in a sentence."""
    left_out = ", ".join(f"{plain(reference)} ({why})" for reference, why in pool.excluded.items())
    initialization = pool.initialization.name or pool.initialization.fingerprint[:19]
    among = f"among {pool.size} vectors of initialization {initialization} ({pool.rule})"
    return f"{among}; left out: {left_out}" if left_out else among
