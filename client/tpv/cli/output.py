"""What commands show: tables and sentences for people, JSON for programs. Commands hand over data and never format."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import typer
from pydantic_core import to_jsonable_python


class Output:
    """Standard output, in the form that the command line asks for."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json

    def table(
        self, data: Iterable[Any], columns: Sequence[str], rows: Iterable[Sequence[Any]], *, empty: str = "none"
    ) -> None:
        """A list: `data` as JSON, or `rows` under `columns`."""
        if self.as_json:
            self.json(list(data))
            return
        shown = [[cell(value) for value in row] for row in rows]
        if not shown:
            typer.echo(empty)
            return
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in columns:
            table.add_column(column, no_wrap=not sys.stdout.isatty(), overflow="fold")
        for row in shown:
            table.add_row(*map(Text, row))
        self._print(table)

    def record(self, data: Any, members: Mapping[str, Any]) -> None:
        """One thing: `data` as JSON, or its members, a line each."""
        if self.as_json:
            self.json(data)
            return
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, show_header=False)
        for name, value in members.items():
            if value not in (None, "", [], {}):
                table.add_row(Text(name, style="bold"), Text(cell(value), overflow="fold"))
        self._print(table)

    def tree(self, root: str, branches: Mapping[str, Sequence[tuple[str, str]]]) -> None:
        """A graph from its root on: below each thing its branches (key, text).

        What is reached on a second way is shown there without its own branches.
        """
        shown: set[str] = set()
        waiting = [(root, root, "", "")]
        while waiting:  # not by recursion: a lineage may be long
            key, text, before, below = waiting.pop()
            again = key in shown and key in branches
            typer.echo(before + cell(text) + (" (see above)" if again else ""))
            if key in shown:
                continue
            shown.add(key)
            inner = [(branch, label, f"{below}├── ", f"{below}│   ") for branch, label in branches.get(key, ())]
            if inner:
                inner[-1] = (*inner[-1][:2], f"{below}└── ", f"{below}    ")
            waiting += reversed(inner)

    def line(self, data: Any, sentence: str) -> None:
        """An outcome: `data` as JSON, or a sentence."""
        if self.as_json:
            self.json(data)
        else:
            typer.echo(sentence)

    def note(self, sentence: str) -> None:
        """A sentence beside the data; nothing in JSON."""
        if not self.as_json:
            typer.echo(sentence)

    def json(self, data: Any) -> None:
        typer.echo(json.dumps(to_jsonable_python(data), indent=2, ensure_ascii=False))

    @staticmethod
    def _print(table: Any) -> None:
        from rich.console import Console

        # What is piped is not cut to the width of a terminal that is not there.
        Console(width=None if sys.stdout.isatty() else 1000, highlight=False).print(table)


def cell(value: Any) -> str:
    """A value as it stands in a table."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, datetime):
        return value.astimezone().strftime("%Y-%m-%d %H:%M")
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={cell(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, list | tuple):
        return ", ".join(map(cell, value))
    text = str(value)
    return text if text.isprintable() else json.dumps(text, ensure_ascii=False)  # a line break would break the table


def short(fingerprint: str | None) -> str:
    """A fingerprint that people compare at a glance."""
    return fingerprint[:19] if fingerprint else ""


def plain(reference: str | None) -> str:
    """A reference without the default namespace."""
    return (reference or "").removeprefix("default/")
