"""Whether vectors of two initializations may meet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tpv.errors import IncompatibleVectors
from tpv_service.registry.tables import InitializationRow, VersionRow
from tpv_service.registry.views import version_reference

_FACTS: Mapping[str, Callable[[InitializationRow], Any]] = {
    "fingerprint": lambda row: row.fingerprint,
    "base_model": lambda row: row.base_model.name,
    "base_model_revision": lambda row: row.base_model.revision,
    "base_model_digest": lambda row: row.base_model.digest,
    "num_virtual_tokens": lambda row: row.num_virtual_tokens,
    "token_dim": lambda row: row.token_dim,
}


def are_mixed(one: tuple[str, InitializationRow], other: tuple[str, InitializationRow], *, allowed: bool) -> bool:
    """Whether the initializations of two things, each given with its name, are different ones.

    Raises IncompatibleVectors with the differences unless that is allowed; of another base model or shape in any case.
    """
    (first, a), (second, b) = one, other
    if a.id == b.id:
        return False
    differences = {name: [of(a), of(b)] for name, of in _FACTS.items() if of(a) != of(b)}
    fits = a.base_model_id == b.base_model_id and not differences.keys() & {"num_virtual_tokens", "token_dim"}
    if allowed and fits:
        return True
    hint = (
        "say allow_mixed_initializations to use them together all the same"
        if fits
        else "vectors of another base model or shape never go together"
    )
    raise IncompatibleVectors(
        f"{first} belongs to initialization {label(a)}, {second} to {label(b)}: they differ in "
        f"{', '.join(differences)}; {hint}",
        differences=differences,
    )


def check_same_initialization(
    rows: Sequence[VersionRow], *, first: tuple[str, InitializationRow] | None = None, mixed: bool = False
) -> None:
    """Raises IncompatibleVectors unless all versions, and what comes `first`, may meet; `mixed` as in `are_mixed`."""
    first = first or (version_reference(rows[0]), rows[0].initialization)
    for row in rows:
        if row.initialization_id != first[1].id:
            are_mixed(first, (version_reference(row), row.initialization), allowed=mixed)


def label(row: InitializationRow) -> str:
    """How people call it."""
    return f"{row.namespace}/{row.name}" if row.name else str(row.id)
