"""`tpv vector`: task prompt vectors, their versions, aliases and tags."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from tpv._base import UNSET
from tpv.cli.options import Description, Json, Limit, Namespace, TagPairs, Versions, connect, pairs, values
from tpv.cli.output import Output, plain, short
from tpv.files import metadata
from tpv.references import Reference
from tpv.schemas.lineage import LineageEdge
from tpv.schemas.vectors import Evaluation, Parent, Version

app = typer.Typer(help="Task prompt vectors: versions, aliases, tags, content.", no_args_is_help=True)

ReferenceArgument = Annotated[str, typer.Argument(help="[namespace/]name, name:3 or name@alias.")]
_FIGURE = "[[DATASET/]SPLIT/]METRIC=VALUE"
NameArgument = Annotated[str, typer.Argument(help="[namespace/]name.")]


@app.command("register")
def register(
    context: typer.Context,
    name: NameArgument,
    file: Annotated[Path, typer.Argument(help="Safetensors file with one tensor, `prompt` (P*) or `vector` (T).")],
    initialization: Annotated[str, typer.Option("--initialization", "-i", help="Name, id or fingerprint.")],
    task: Annotated[list[str] | None, typer.Option(help="What it was tuned for; repeatable.")] = None,
    task_type: Annotated[str | None, typer.Option(help="Such as nli or sentiment.")] = None,
    description: Description = None,
    tags: TagPairs = None,
    metrics: Annotated[
        str | None, typer.Option(help='JSON list of {"dataset", "split", "metric", "value", "n"}, or @FILE.')
    ] = None,
    method: Annotated[str | None, typer.Option(help="How it was tuned.")] = None,
    hyperparameters: Annotated[
        list[str] | None, typer.Option("--hyperparameter", metavar="KEY=VALUE", help="Repeatable.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Registers a tuned prompt or a vector as the next version of a name."""
    with connect(context) as client:
        version = client.vectors.register(
            name,
            file=file,
            initialization=initialization,
            task=task or None,
            task_type=task_type,
            description=description,
            tags=pairs(tags, option="--tag") or None,
            metrics=_listed(_json(metrics, "--metrics")),
            method=method,
            hyperparameters=values(hyperparameters, option="--hyperparameter") or None,
            progress=sys.stderr.isatty() and not as_json,
        )
    what = "registered" if version.created else "is there already:"
    Output(as_json).line(version, f"{what} {plain(version.reference)}  {version.fingerprint}")


@app.command("list")
def list_(
    context: typer.Context,
    namespace: Namespace = None,
    task: Annotated[str | None, typer.Option(help="Only of this task.")] = None,
    task_type: Annotated[str | None, typer.Option(help="Only of this task type.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Only of this base model.")] = None,
    tags: TagPairs = None,
    deleted: Annotated[bool, typer.Option("--deleted", help="Only what was deleted.")] = False,
    limit: Limit = 100,
    as_json: Json = False,
) -> None:
    """Lists vectors."""
    with connect(context) as client:
        found = list(
            islice(
                client.vectors.list(
                    namespace=namespace,
                    task=task,
                    task_type=task_type,
                    base_model=base_model,
                    tags=pairs(tags, option="--tag"),
                    deleted=deleted,
                ),
                limit,
            )
        )
    columns = ["name", "version", "task", "type", "aliases", "tags", "base model", "created"]
    Output(as_json).table(
        found,
        [*columns, "deleted"] if deleted else columns,
        ([plain(f"{v.namespace}/{v.name}"), v.newest_version, v.tasks, v.task_type,
          [f"{alias}->{version}" for alias, version in v.aliases.items()], v.tags, v.base_models, v.created_at,
          *([v.deleted_at] if deleted else [])] for v in found),
        empty="no vectors; register one with: tpv vector register NAME FILE -i INITIALIZATION",
    )  # fmt: skip


@app.command("search")
def search(
    context: typer.Context,
    names: Annotated[list[str] | None, typer.Option("--name", help="One of these; repeatable.")] = None,
    namespace: Namespace = None,
    task: Annotated[str | None, typer.Option(help="Only of this task.")] = None,
    task_type: Annotated[str | None, typer.Option(help="Only of this task type.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Only of this base model.")] = None,
    initialization: Annotated[str | None, typer.Option("--initialization", "-i", help="Only of this one.")] = None,
    tags: TagPairs = None,
    alias: Annotated[str | None, typer.Option(help="Only versions that this alias points to.")] = None,
    method: Annotated[str | None, typer.Option(help="Only what was made by this method.")] = None,
    at_least: Annotated[list[str] | None, typer.Option(metavar=_FIGURE, help="A metric's least; repeatable.")] = None,
    at_most: Annotated[list[str] | None, typer.Option(metavar=_FIGURE, help="A metric's most; repeatable.")] = None,
    created_after: Annotated[datetime | None, typer.Option(help="Registered then or later, in local time.")] = None,
    created_before: Annotated[datetime | None, typer.Option(help="Registered earlier, in local time.")] = None,
    tree: Annotated[
        str | None,
        typer.Option("--filter", help="A filter with all, any and not, as JSON or @FILE; all hold together."),
    ] = None,
    versions: Versions = None,
    sort: Annotated[
        list[str] | None,
        typer.Option(help="name, created_at, norm or DATASET/SPLIT/METRIC; a - in front descends; repeatable."),
    ] = None,
    limit: Limit = 100,
    as_json: Json = False,
) -> None:
    """Finds versions by what is known of them: of each vector the newest."""
    metrics = [_figure(text, "at_least") for text in at_least or ()] + [
        _figure(text, "at_most") for text in at_most or ()
    ]
    with connect(context) as client:
        found = list(
            islice(
                client.vectors.search(
                    _json(tree, "--filter"),
                    versions=versions,
                    sort=sort or (),
                    names=names or None,
                    namespace=namespace,
                    task=task,
                    task_type=task_type,
                    base_model=base_model,
                    initialization=initialization,
                    tags=pairs(tags, option="--tag") or None,
                    alias=alias,
                    method=method,
                    metrics=metrics or None,
                    created_after=created_after and created_after.astimezone(),
                    created_before=created_before and created_before.astimezone(),
                    page_size=min(limit, 1000),
                ),
                limit,
            )
        )
    Output(as_json).table(
        found,
        ["vector", "aliases", "method", "initialization", "norm", "figures", "created"],
        ([plain(v.reference), v.aliases, v.method, v.initialization.name or short(v.initialization.fingerprint), v.norm,
          {f"{e.split}/{e.metric}": e.value for e in v.evaluations}, v.created_at] for v in found),
        empty="no version passes; see what is there: tpv vector list",
    )  # fmt: skip


@app.command("show")
def show(context: typer.Context, reference: ReferenceArgument, as_json: Json = False) -> None:
    """Shows a version (the newest for a bare name), and what its vector's versions share."""
    with connect(context) as client:
        version = client.vectors.get(reference)
        vector = client.vectors.describe(f"{version.namespace}/{version.name}")
        others = list(client.vectors.versions(f"{version.namespace}/{version.name}"))
    out = Output(as_json)
    if as_json:
        out.json({**version.model_dump(mode="json"), "vector": vector, "versions": [v.version for v in others]})
        return
    out.record(version, {**_members(version), "tasks": vector.tasks, "task type": vector.task_type,
                         "description": vector.description, "tags": vector.tags,
                         "versions": [v.version for v in others]})  # fmt: skip
    if version.evaluations:
        out.note("")
        out.table(
            [],
            ["dataset", "split", "metric", "value", "rows", "seed", "predictions"],
            ([plain(e.dataset), e.split, e.metric, e.value, e.n, e.seed, _kept(e)] for e in version.evaluations),
        )


@app.command("download")
def download(
    context: typer.Context,
    reference: ReferenceArgument,
    path: Annotated[Path | None, typer.Argument(help="Where to save it; default NAME-VERSION.safetensors.")] = None,
    as_json: Json = False,
) -> None:
    """Saves a version's safetensors file (the tensor `vector`), verified."""
    with connect(context) as client:
        version = client.vectors.get(reference)
        target = path or Path(f"{version.name}-{version.version}.safetensors")
        version.download(target, progress=sys.stderr.isatty() and not as_json)
    Output(as_json).line(
        {"reference": version.reference, "path": str(target), "digest": version.digest, "size": version.size},
        f"saved {plain(version.reference)} to {target}",
    )


@app.command("prompt")
def prompt(
    context: typer.Context,
    reference: ReferenceArgument,
    path: Annotated[Path, typer.Argument(help="Where to save it, as safetensors.")],
    initialization: Annotated[
        str | None, typer.Option("--initialization", "-i", help="P_init; default: the one that the vector belongs to.")
    ] = None,
    scale: Annotated[float, typer.Option(help="The factor on T.")] = 1.0,
    allow_mixed_initializations: Annotated[
        bool,
        typer.Option("--allow-mixed-initializations", help="Let --initialization be another one than the vector's."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Saves the soft prompt P_init + scale * T (the tensor `prompt`)."""
    with connect(context) as client:
        tensor = client.vectors.prompt(
            reference,
            initialization,
            scale,
            allow_mixed_initializations=allow_mixed_initializations,
            file=path,
        )
    rows, width = tensor.shape
    made = metadata(path.read_bytes())
    Output(as_json).line(
        {**made, "path": str(path), "shape": [rows, width]},
        f"saved {plain(made['vector'])} with scale {scale:g} on {short(made['initialization'])} to {path}: "
        f"{rows} x {width}",
    )


@app.command("lineage")
def lineage(context: typer.Context, reference: ReferenceArgument, as_json: Json = False) -> None:
    """Shows what a version was made from, and what was made from it, over any number of steps."""
    with connect(context) as client:
        found = client.vectors.lineage(reference)
    out = Output(as_json)
    nodes = {node.reference: node for node in found.nodes}

    def line(key: str, edge: LineageEdge | None = None) -> str:
        node = nodes[key]
        weight = "" if edge is None or edge.weight is None else f" x {edge.weight:g}"
        parts = [edge and edge.role + weight, plain(key), node.method, "(deleted)" if node.deleted else None]
        return " ".join(part for part in parts if part)

    made_from: dict[str, list[tuple[str, str]]] = {}
    made_into: dict[str, list[tuple[str, str]]] = {}
    for edge in found.edges:
        made_from.setdefault(edge.child, []).append((edge.parent, line(edge.parent, edge)))
        made_into.setdefault(edge.parent, []).append((edge.child, line(edge.child, edge)))
    if as_json:
        out.json(found)
        return
    root = found.reference
    out.note(line(root))
    for title, branches in (("made from", made_from), ("made into", made_into)):
        if root in branches:
            out.tree(title, {**branches, title: branches[root]})
    if found.truncated:
        out.note("there is more; the nearest are shown")


@app.command("alias")
def alias(
    context: typer.Context,
    name: NameArgument,
    alias: Annotated[str, typer.Argument(help="Such as best.")],
    version: Annotated[int | None, typer.Argument(min=1, help="The version that it is to point to.")] = None,
    expect: Annotated[int | None, typer.Option(min=1, help="Refuse unless it points to this version now.")] = None,
    reason: Annotated[str | None, typer.Option(help="Kept in the history.")] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Remove the alias.")] = False,
    history: Annotated[bool, typer.Option("--history", help="Show its moves.")] = False,
    as_json: Json = False,
) -> None:
    """Points an alias to a version, removes it, or shows its history."""
    if (version is not None) + delete + history != 1:
        raise typer.BadParameter("give a version, --delete or --history")
    out = Output(as_json)
    with connect(context) as client:
        if history:
            moves = client.vectors.alias_history(name, alias)
            out.table(
                moves,
                ["when", "from", "to", "by", "why"],
                ([m.at, m.from_version, m.to_version, m.actor, m.reason] for m in moves),
            )
        elif delete:
            client.vectors.delete_alias(name, alias)
            out.line({"alias": alias, "version": None}, f"removed {name}@{alias}")
        elif version is not None:
            found = client.vectors.set_alias(name, alias, version, expected_version=expect, reason=reason)
            out.line(found, f"{name}@{alias} is {name}:{found.version}")


@app.command("tag")
def tag(
    context: typer.Context,
    name: NameArgument,
    tags: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Tags to set.")] = None,
    remove: Annotated[list[str] | None, typer.Option(help="A tag to remove, by its key; repeatable.")] = None,
    description: Description = None,
    task_type: Annotated[str | None, typer.Option(help="Such as nli or sentiment.")] = None,
    as_json: Json = False,
) -> None:
    """Sets and removes tags, and changes description and task type; without any, shows them."""
    changes: dict[str, Any] = {"description": description, "task_type": task_type}
    with connect(context) as client:
        vector = client.vectors.describe(name)
        new = {key: value for key, value in vector.tags.items() if key not in (remove or ())}
        new |= pairs(tags, option="KEY=VALUE")
        changes = {key: UNSET if value is None else value for key, value in changes.items()}
        if new != vector.tags or any(value is not UNSET for value in changes.values()):
            vector = client.vectors.update(name, tags=new if new != vector.tags else UNSET, **changes)
    Output(as_json).record(
        vector, {"name": plain(f"{vector.namespace}/{vector.name}"), "tags": vector.tags,
                 "description": vector.description, "task type": vector.task_type},
    )  # fmt: skip


@app.command("delete")
def delete(
    context: typer.Context,
    reference: ReferenceArgument,
    force: Annotated[
        bool, typer.Option("--force", help="Even if an alias, a job or a descendant points there.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Deletes a version, or the whole vector for a bare name; it can be restored."""
    with connect(context) as client:
        shown = reference
        if Reference.parse(reference).alias:  # an alias may move; say which version went
            shown = plain(client.vectors.get(reference).reference)
        client.vectors.delete(shown, force=force)
    Output(as_json).line({"deleted": shown}, f"deleted {shown}; bring it back with: tpv vector restore {shown}")


@app.command("restore")
def restore(context: typer.Context, reference: ReferenceArgument, as_json: Json = False) -> None:
    """Undoes the deletion of a version, or of a whole vector."""
    with connect(context) as client:
        client.vectors.restore(reference)
    Output(as_json).line({"restored": reference}, f"restored {reference}")


def _json(text: str | None, option: str) -> Any:
    """The JSON of an option, or of the file that it names as @FILE."""
    if text is None:
        return None
    try:
        return json.loads(Path(text[1:]).read_text() if text.startswith("@") else text)
    except ValueError as error:
        raise typer.BadParameter(f"this is no JSON: {error}", param_hint=option) from error


def _listed(found: Any) -> Any:
    return [found] if isinstance(found, dict) else found


def _figure(text: str, bound: str) -> dict[str, Any]:
    """A metric's condition, of `test/accuracy=0.8`."""
    key, _, value = text.rpartition("=")
    metric, split, dataset = [*reversed(key.rsplit("/", 2)), None, None][:3]
    try:
        return {"metric": metric, "split": split, "dataset": dataset, bound: float(value)}
    except ValueError as error:
        option = f"--{bound.replace('_', '-')}"
        raise typer.BadParameter(f"{text!r} is not written as {_FIGURE}", param_hint=option) from error


def _kept(evaluation: Evaluation) -> str:
    return short(evaluation.predictions)


def _parent(parent: Parent) -> str:
    weight = "" if parent.weight is None else f" x {parent.weight:g}"
    return f"{parent.role} {plain(parent.reference)}{weight}"


def _members(version: Version) -> dict[str, Any]:
    initialization = version.initialization
    return {
        "reference": plain(version.reference),
        "fingerprint": version.fingerprint,
        "prompt": version.prompt_fingerprint,
        "initialization": initialization.name or initialization.fingerprint,
        "base model": initialization.base_model,
        "shape": f"{initialization.num_virtual_tokens} x {initialization.token_dim}",
        "norm": version.norm,
        "method": version.method,
        "hyperparameters": version.hyperparameters,
        "parents": [_parent(parent) for parent in version.parents],
        "aliases": version.aliases,
        "job": version.job,
        "by": version.actor,
        "created": version.created_at,
        "deleted": version.deleted_at,
    }  # fmt: skip
