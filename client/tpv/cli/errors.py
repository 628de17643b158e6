"""Errors as one readable line that ends with the next command to type."""

from __future__ import annotations

import re
from collections.abc import Callable

from tpv import errors

NEEDS_EXTRA = "needs: pip install 'tpv-registry[lab]'"

_LISTS = {
    "initialization": "tpv init list",
    "vector": "tpv vector list",
    "data set": "tpv dataset list",
    "job": "tpv job list",
}


def explain(error: Exception) -> str | None:
    """The line for an error that a user may meet; None for one that only a bug explains."""
    for known, hint in HINTS:
        if isinstance(error, known):
            text = _one_line(str(error)) or type(error).__name__
            command = "" if re.search(r"\btpv [a-z]", text) else hint(error)
            return f"{text}; {command}" if command else text
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] not in ("tpv", ""):
        return f"{error.name} is not installed here; {NEEDS_EXTRA}"
    if isinstance(error, OSError):
        return f"{error.strerror or error}: {error.filename}" if error.filename else _one_line(str(error))
    return None


def _not_found(error: Exception) -> str:
    for noun, command in _LISTS.items():
        if noun in str(error):
            return f"see: {command}"
    return "see: tpv --help"


def _in_use(error: Exception) -> str:
    return "delete it all the same with: --force"


def _failed(error: Exception) -> str:
    job = getattr(error, "job", None)
    return f"see: tpv job show {job.id}" if job is not None else "see: tpv job list"


def _fixed(text: str) -> Callable[[Exception], str]:
    return lambda error: text


#: The first class that an error belongs to gives the hint.
HINTS: list[tuple[type[Exception], Callable[[Exception], str]]] = [
    (errors.ConnectionFailed, _fixed("check --url or TPV_URL, or start a service with: tpv up")),
    (errors.JobFailed, _failed),
    (errors.WaitTimeout, _fixed("it goes on; watch it with: tpv job watch JOB")),
    (errors.NotFound, _not_found),
    (errors.InUse, _in_use),
    (errors.AliasMoved, _fixed("see who moved it: tpv vector alias NAME ALIAS --history")),
    (errors.VersionConflict, _fixed("see what is there: tpv vector show NAME")),
    (errors.IncompatibleVectors, _fixed("compare their initializations: tpv vector show NAME")),
    (errors.JobFinished, _fixed("see: tpv job show JOB")),
    (errors.InvalidReference, _fixed("write [namespace/]name, name:3 or name@alias; see: tpv vector list")),
    (errors.InvalidOptions, _fixed("see: tpv job tune --help")),
    (errors.Unauthorized, _fixed("pass --token or set TPV_TOKEN; make one with: tpv admin token create")),
    (errors.Forbidden, _fixed("use a token with that scope; make one with: tpv admin token create")),
    (errors.Unavailable, _fixed("try again; see whether it runs: tpv up")),
    (errors.DamagedContent, _fixed("look for more of it with: tpv admin verify")),
    (errors.TpvError, _fixed("")),
]


def _one_line(text: str) -> str:
    return " ".join(text.split())
