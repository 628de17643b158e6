"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from tpv._sync.client import Client

Json = Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel="Output")]
Namespace = Annotated[str | None, typer.Option(help="Only this namespace.")]
Versions = Annotated[str | None, typer.Option(help="Of each vector: newest (the default), all, or alias:NAME.")]
Limit = Annotated[int, typer.Option(min=1, help="Rows at most.")]
Description = Annotated[str | None, typer.Option(help="A text for people.")]
TagPairs = Annotated[list[str] | None, typer.Option("--tag", metavar="KEY=VALUE", help="A tag; repeatable.")]
OptionPairs = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        "-o",
        metavar="KEY=VALUE",
        help="An option of the method, its value read as JSON if it is; repeatable.",
    ),
]


@dataclass(frozen=True)
class Root:
    """What was said before the noun."""

    url: str | None = None
    token: str | None = None


def connect(context: typer.Context) -> Client:
    """The client that the command line asks for."""
    root = context.obj if isinstance(context.obj, Root) else Root()
    return Client(root.url, root.token)


def pairs(values: Sequence[str] | None, *, option: str) -> dict[str, str]:
    """`key=value` arguments as text."""
    found = {}
    for value in values or ():
        key, equals, text = value.partition("=")
        if not equals or not key:
            raise typer.BadParameter(f"{value!r} is not written as key=value", param_hint=option)
        found[key.strip()] = text
    return found


def values(given: Sequence[str] | None, *, option: str = "--option") -> dict[str, Any]:
    """`key=value` arguments; a value that is JSON is taken as such, other text as it stands."""
    return {key.replace("-", "_"): _value(text) for key, text in pairs(given, option=option).items()}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
