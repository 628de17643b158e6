"""Which package may import which: service -> client and worker -> client, and the service never what trains."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = {"tpv", "tpv_service", "tpv_worker"}
HEAVY = {"torch", "transformers", "tokenizers", "tpv_worker"}


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and top-level package of every import in a file, those inside functions and for type checkers included."""
    for node in ast.walk(ast.parse(path.read_text(), path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.lineno, node.module.split(".")[0]


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [
        ("client", {"tpv"}),
        ("service", {"tpv", "tpv_service"}),
        ("worker", {"tpv", "tpv_worker"}),
        ("migrations", {"tpv", "tpv_service"}),
    ],
)
def test_imports_go_in_one_direction(folder: str, allowed: set[str]) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    found = {(path.relative_to(ROOT), line, name) for path in files for line, name in imported(path)}
    assert [(path, line, name) for path, line, name in sorted(found) if name in OURS - allowed] == []
    assert allowed & {name for _, _, name in found}  # the files were there and were read


@pytest.mark.parametrize("module", ["tpv_service.app", "tpv_service.server", "tpv_service.cli", "tpv_service.migrate"])
def test_the_service_does_not_load_what_trains(module: str) -> None:
    script = f"import {module}, sys, json; print(json.dumps(sorted(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout
    assert not HEAVY & {name.split(".")[0] for name in json.loads(loaded)}
