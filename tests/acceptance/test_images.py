"""docker/Dockerfile: what the images are built from and run as."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tests.acceptance.compose import COMPOSE, OURS, ROOT, SERVICES, instructions, stages, target_of

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_images_are_built_from_what_is_there() -> None:
    for base, _ in stages().values():
        assert base in stages() or re.fullmatch(r"python:3\.12-slim-\w+", base)
    for service in SERVICES.values():
        if "build" in service:
            assert (ROOT / service["build"]["dockerfile"]).is_file()
            assert service["build"]["target"] in stages()
            arguments = {
                words[1].split("=")[0] for _, lines in stages().values() for words in lines if words[0] == "ARG"
            }
            assert set(service["build"].get("args", {})) <= arguments
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert all((ROOT / path).exists() for path in kept)
    assert "constraints.txt" in kept


@pytest.mark.parametrize("name", OURS)
def test_containers_run_as_an_ordinary_user(name: str) -> None:
    lines = instructions(target_of(name))
    assert [words[1] for words in lines if words[0] == "USER"] == ["tpv"]
    home = [words[1] for words in lines if words[0] == "WORKDIR"][-1]
    for volume in SERVICES[name].get("volumes", []):
        source, target = volume.split(":")[:2]
        if source in COMPOSE["volumes"]:  # a new one takes the owner of the directory in the image
            assert target.startswith(f"{home}/")
            assert any(f"--owner=tpv --group=tpv {target}" in words[1] for words in lines if words[0] == "RUN")


@pytest.mark.parametrize(("target", "package"), [("service", "service/tpv_service"), ("worker", "worker/tpv_worker")])
def test_an_image_installs_what_its_code_imports(target: str, package: str) -> None:
    (extra,) = [
        extra
        for _, lines in stages().values()
        for words in lines
        for extra in re.findall(r"pip install .*--constraint constraints.txt '\.\[(\w+)\]'", words[-1])
        if extra == target
    ]
    installed = _closure([*PROJECT["dependencies"], *PROJECT["optional-dependencies"][extra]])
    distributions = packages_distributions()
    of_lab = [ROOT / package / "embedded", ROOT / package / "lab"]  # `tpv up` and `tpv lab` need the extra `lab`
    for path in (ROOT / package).rglob("*.py"):
        if any(path.is_relative_to(directory) for directory in of_lab):
            continue
        for module in _imported(path) - sys.stdlib_module_names - {"tpv", "tpv_service", "tpv_worker"}:
            assert installed & {canonicalize_name(each) for each in distributions[module]}, f"{path}: {module}"


def _imported(path: Path) -> set[str]:
    """The top-level packages that a file imports anywhere."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    plain = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return {name.split(".")[0] for name in plain} | {
        node.module.split(".")[0]
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module and not node.level
    }


def _closure(requirements: list[str]) -> set[str]:
    """The distributions that get installed with these."""
    found: set[str] = set()
    seen: set[tuple[str, str]] = set()
    todo = [(Requirement(each), "") for each in requirements]
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        found.add(name)
        for wanted in {"", *requirement.extras} - {extra for known, extra in seen if known == name}:
            seen.add((name, wanted))
            todo += [(Requirement(each), wanted) for each in requires(name) or []]
    return found
