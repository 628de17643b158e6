"""`tpv similarity`: how close tasks are, by their vectors."""

from __future__ import annotations

import sys
from csv import writer as csv_writer
from typing import Annotated, Literal

import typer

from tpv.cli.options import Json, Namespace, Versions, connect, pairs
from tpv.cli.output import Output, plain
from tpv.schemas.similarity import MatrixAnswer, PoolEcho
from tpv.similarity import Metric

_SHOWN = 10  #: vectors left out that a sentence names

app = typer.Typer(help="How close tasks are, by their vectors.", no_args_is_help=True)

CandidateOptions = Annotated[
    list[str] | None, typer.Option("--candidate", "-c", help="Only these vectors; repeatable. None: all that pass.")
]
TaskOption = Annotated[str | None, typer.Option(help="Only vectors of this task.")]
TaskTypeOption = Annotated[str | None, typer.Option(help="Only vectors of this task type.")]
MetricOption = Annotated[Metric, typer.Option(help="How vectors are compared.")]
TagOption = Annotated[list[str] | None, typer.Option("--tag", metavar="KEY=VALUE", help="Only with this; repeatable.")]
MixedOption = Annotated[
    bool,
    typer.Option("--allow-mixed-initializations", help="Also vectors of other initializations of the base model."),
]
ReferenceOption = Annotated[
    list[str] | None,
    typer.Option(
        "--reference",
        metavar="VECTOR",
        help="For a centred metric: a vector of those whose mean is subtracted; repeatable. Default: the newest of "
        "each vector of the initialization.",
    ),
]
SameTask = Annotated[bool, typer.Option("--allow-same-task", help="Also vectors of the same task.")]


@app.command("search")
def search(
    context: typer.Context,
    query: Annotated[
        list[str], typer.Argument(help="The vector to compare with, or several as NAME=WEIGHT: their weighted sum.")
    ],
    k: Annotated[int, typer.Option("-k", "--k", min=1, max=1000, help="Hits at most.")] = 10,
    metric: MetricOption = "dot",
    reference_pool: ReferenceOption = None,
    candidates: CandidateOptions = None,
    task: TaskOption = None,
    task_type: TaskTypeOption = None,
    namespace: Namespace = None,
    tag: TagOption = None,
    versions: Versions = None,
    allow_same_task: SameTask = False,
    allow_mixed_initializations: MixedOption = False,
    accuracy: Annotated[
        Literal["auto", "exact", "approximate"], typer.Option(help="Whether an index may be asked.")
    ] = "auto",
    ef_search: Annotated[
        int | None, typer.Option(min=1, max=1000, help="How thoroughly the index is searched.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Finds the vectors most similar to one, or to a combination."""
    with connect(context) as client:
        answer = client.similarity.search(
            query[0] if len(query) == 1 and "=" not in query[0] else _terms(query),
            k,
            metric=metric,
            reference_pool=reference_pool or None,
            candidates=candidates or None,
            task=task,
            task_type=task_type,
            namespace=namespace,
            tags=pairs(tag, option="--tag") or None,
            versions=versions,
            allow_same_task=allow_same_task or None,
            allow_mixed_initializations=allow_mixed_initializations or None,
            accuracy=accuracy,
            ef_search=ef_search,
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
    references: Annotated[
        list[str] | None, typer.Argument(help="The vectors to compare; none: all that pass the filters.")
    ] = None,
    metric: MetricOption = "dot",
    reference_pool: ReferenceOption = None,
    task: TaskOption = None,
    task_type: TaskTypeOption = None,
    namespace: Namespace = None,
    initialization: Annotated[str | None, typer.Option(help="Only vectors of this initialization.")] = None,
    tag: TagOption = None,
    versions: Versions = None,
    normalize: Annotated[bool, typer.Option(help="Map the smallest to 0 and the largest to 1.")] = False,
    allow_mixed_initializations: MixedOption = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV.", rich_help_panel="Output")] = False,
    as_json: Json = False,
) -> None:
    """Compares vectors, each with each; similar ones are shown side by side."""
    with connect(context) as client:
        answer = client.similarity.matrix(
            references or None,
            metric=metric,
            reference_pool=reference_pool or None,
            task=task,
            task_type=task_type,
            namespace=namespace,
            initialization=initialization,
            tags=pairs(tag, option="--tag") or None,
            versions=versions,
            normalize=normalize or None,
            allow_mixed_initializations=allow_mixed_initializations or None,
        )
    out = Output(as_json)
    if as_json:
        out.json(answer)
        return
    names = [plain(answer.references[i]) for i in answer.order]
    rows = [[name, *(answer.matrix[i][j] for j in answer.order)] for name, i in zip(names, answer.order, strict=True)]
    if csv:
        writer = csv_writer(sys.stdout, lineterminator="\n")
        writer.writerows([["", *names], *rows])
        return
    out.table([], [answer.metric, *names], rows)
    normalized = ", mapped to 0 to 1" if answer.normalized else ""
    out.note(f"{len(names)} vectors of {_initializations(answer)}{_center(answer)}{normalized}")


def _terms(arguments: list[str]) -> list[tuple[str, float]]:
    """`NAME=WEIGHT` arguments of a combination; a name alone weighs 1."""
    terms = []
    for argument in arguments:
        name, _, weight = argument.partition("=")
        try:
            terms.append((name, float(weight or 1)))
        except ValueError as error:
            raise typer.BadParameter(f"{argument!r} is not written as NAME=WEIGHT", param_hint="QUERY") from error
    return terms


def pool_line(pool: PoolEcho) -> str:
    """What a query looked at, in a sentence."""
    left_out = ", ".join(f"{plain(reference)} ({why})" for reference, why in list(pool.excluded.items())[:_SHOWN])
    more = f" and {pool.excluded_total - _SHOWN} more" if pool.excluded_total > _SHOWN else ""
    among = f"among {pool.size} vectors of {_initializations(pool)} ({pool.rule}; {pool.how}){_center(pool)}"
    return f"{among}; left out: {left_out}{more}" if left_out else among


def _initializations(answer: PoolEcho | MatrixAnswer) -> str:
    rows = (answer.initialization, *answer.mixed_initializations)
    return "initialization " + " and ".join(row.name or row.fingerprint[:19] for row in rows)


def _center(answer: PoolEcho | MatrixAnswer) -> str:
    """What a centred metric has subtracted."""
    pool = answer.reference_pool
    return f", less the mean of {pool.size} ({pool.rule})" if pool else ""
