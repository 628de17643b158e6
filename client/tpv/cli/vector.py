"""`tpv vector`: task prompt vectors, their versions, aliases and tags."""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from tpv._base import UNSET
from tpv.cli.options import Description, Json, Limit, Namespace, TagPairs, connect, pairs, values
from tpv.cli.output import Output, plain, short
from tpv.references import Reference
from tpv.schemas.vectors import Evaluation, Parent, Version

app = typer.Typer(help="Task prompt vectors: versions, aliases, tags, content.", no_args_is_help=True)

ReferenceArgument = Annotated[str, typer.Argument(help="[namespace/]name, name:3 or name@alias.")]
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
            metrics=_metrics(metrics),
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


def _metrics(text: str | None) -> list[dict[str, Any]] | None:
    if text is None:
        return None
    try:
        found = json.loads(Path(text[1:]).read_text() if text.startswith("@") else text)
    except ValueError as error:
        raise typer.BadParameter(f"this is no JSON: {error}", param_hint="--metrics") from error
    return found if isinstance(found, list) else [found]


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
