"""docker-compose.yml and the Dockerfile, read as Compose and BuildKit read them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tpv_service.settings import Settings as ServiceSettings
from tpv_worker.settings import Settings as WorkerSettings

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = (ROOT / "docker/Dockerfile").read_text()
ENV_EXAMPLE = (ROOT / ".env.example").read_text()

OURS: dict[str, type[ServiceSettings] | type[WorkerSettings]] = {
    "migrate": ServiceSettings,
    "api": ServiceSettings,
    "worker": WorkerSettings,
    "worker-gpu": WorkerSettings,
}
ONE_SHOT = {"migrate", "queue-role"}


def interpolate(node: Any, variables: Mapping[str, str]) -> Any:
    """The node with `${NAME}`, `${NAME:-default}` and `${NAME:?message}` replaced; defaults may hold such again."""
    if isinstance(node, dict):
        return {key: interpolate(value, variables) for key, value in node.items()}
    if isinstance(node, list):
        return [interpolate(value, variables) for value in node]
    if not isinstance(node, str) or "$" not in node:
        return node
    start = re.search(r"\$\{(\w+)(:[-?])?", node)
    assert start, f"not understood here: {node}"
    depth, end = 1, start.end()
    while depth:
        depth += {"{": 1, "}": -1}.get(node[end], 0)
        end += 1
    value, operator, operand = variables.get(start[1], ""), start[2], node[start.end() : end - 1]
    if not value and operator == ":?":
        raise LookupError(f"{start[1]}: {operand}")
    if not value and operator == ":-":
        value = interpolate(operand, variables)
    return node[: start.start()] + value + interpolate(node[end:], variables)


def variables_of(node: Any, pattern: str = r"\$\{(\w+)") -> set[str]:
    return set(re.findall(pattern, yaml.safe_dump(node, width=10_000)))


def stages() -> dict[str, tuple[str, list[list[str]]]]:
    """Of each stage of the Dockerfile what it is built on, and its instructions."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    found: dict[str, tuple[str, list[list[str]]]] = {}
    for line in text.splitlines():
        instruction = line.split(maxsplit=1)
        if instruction[:1] == ["FROM"]:
            base, name = instruction[1].split(" AS ")
            found[name] = base, []
        elif instruction:
            found[name][1].append(instruction)
    return found


def instructions(target: str) -> list[list[str]]:
    """What makes a stage, from its first ancestor on."""
    if target not in stages():
        return []
    base, own = stages()[target]
    return [*instructions(base), *own]


def target_of(service: str) -> str:
    """The stage that a service's image is; another service may be the one that builds it."""
    image = SERVICES[service]["image"]
    (build,) = [each["build"] for each in SERVICES.values() if each["image"] == image and "build" in each]
    return str(build["target"])


def entrypoint_of(service: str) -> list[str]:
    """What stands before the command; nothing in the images that are not ours."""
    if service not in OURS:
        return []
    (words,) = [words for instruction, words in instructions(target_of(service)) if instruction == "ENTRYPOINT"]
    return list(json.loads(words))
