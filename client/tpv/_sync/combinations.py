# Generated from client/tpv/_async/combinations.py by scripts/unasync.py; change that file instead.
# ruff: noqa
# fmt: off
"""`client.combinations`: signed, weighted sums of vectors, registered as versions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from tpv import _base, _paths
from tpv._sync.http import Http
from tpv._sync.vectors import VectorVersion
from tpv._paths import InitializationLike, VectorLike
from tpv.merging import MergeMethod
from tpv.schemas.combinations import CombinationAnswer, CombinationCreate


class Combination(CombinationAnswer, VectorVersion):
    """The version that a combination has made or found, with its terms and the way to its content."""


class Combinations:
    """`client.combinations`: signed, weighted sums of vectors, registered as versions."""

    def __init__(self, http: Http) -> None:
        self._http = http

    def create(
        self,
        name: str,
        terms: Mapping[str, float] | Iterable[tuple[VectorLike, float]],
        *,
        method: MergeMethod | None = None,
        density: float | None = None,
        drop: float | None = None,
        seed: int | None = None,
        initialization: InitializationLike | None = None,
        allow_mixed_initializations: bool | None = None,
        task: str | Sequence[str] | None = None,
        task_type: str | None = None,
        description: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> Combination:
        """Registers vectors with signed weights, merged into one, as the next version of `name`; -1 takes one away.

        The service computes what `tpv.merging.merge` gives, to the bit. `method` is `sum`, `mean`, `ties` (with
        `density`) or `dare` (with `drop` and `seed`). Vectors of several initializations raise IncompatibleVectors,
        unless that is allowed and `initialization` names the result's. Content that `name` has already gives back that
        version, with `created` False.
        """
        pairs = terms.items() if isinstance(terms, Mapping) else terms
        members = _base.given(
            method=method,
            density=density,
            drop=drop,
            seed=seed,
            initialization=None if initialization is None else _paths.reference_of(initialization),
            allow_mixed_initializations=allow_mixed_initializations,
            task=[task] if isinstance(task, str) else task,
            task_type=task_type,
            description=description,
            tags=tags,
        )
        request = _base.message(
            CombinationCreate,
            name=name,
            terms=[{"vector": _paths.reference_of(vector), "weight": weight} for vector, weight in pairs],
            **members,
        )
        made = self._http.post(Combination, "/combinations", request)
        made._http = self._http
        return made
