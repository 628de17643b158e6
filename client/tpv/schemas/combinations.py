"""Combinations on the wire: a signed, weighted sum of vectors, registered as a version."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, model_validator

from tpv.merging import MergeMethod
from tpv.schemas.base import Answer, Request, Tags
from tpv.schemas.filters import vector_name
from tpv.schemas.vectors import InitializationSummary, Version

MAX_TERMS = 1000
STACK_LIMIT = 2**25  #: numbers; `ties` and `dare` hold all terms in memory at once


class CombinationTerm(Request):
    vector: str = Field(description="A reference: [namespace/]name, name:3, name@alias or an id.")
    weight: float = Field(allow_inf_nan=False, description="Signed, as it is; -1 takes the vector away.")


class CombinationCreate(Request):
    """Vectors with signed weights, merged as `tpv.merging.merge` does, as the next version of a name."""

    name: Annotated[str, AfterValidator(vector_name)] = Field(description="[namespace/]name of the result.")
    terms: list[CombinationTerm] = Field(min_length=1, max_length=MAX_TERMS)
    method: MergeMethod = "sum"
    density: float | None = Field(None, gt=0, le=1, description="Of ties: the share of each vector's values that stay.")
    drop: float | None = Field(None, ge=0, lt=1, description="Of dare: the probability that a value is dropped.")
    seed: int | None = Field(None, ge=0, lt=2**63, description="Of dare: which values.")
    allow_mixed_initializations: bool = Field(
        False, description="Take terms of other initializations of the same base model and shape, too."
    )
    initialization: str | None = Field(
        None, description="The result's: name, id or fingerprint. Default: the one that all terms share."
    )
    task: list[str] = Field(default_factory=list, max_length=64)
    task_type: str | None = Field(None, max_length=128)
    description: str | None = Field(None, max_length=10_000)
    tags: Tags = Field(default_factory=dict)

    @model_validator(mode="after")
    def _options_of_the_method(self) -> Self:
        wanted = {"ties": {"density"}, "dare": {"drop", "seed"}}.get(self.method, set())
        given = {name for name in ("density", "drop", "seed") if getattr(self, name) is not None}
        if given != wanted:
            needs = " and ".join(sorted(wanted)) or "no options"
            raise ValueError(f"{self.method} takes {needs}; given: {', '.join(sorted(given)) or 'none'}")
        return self

    @property
    def options(self) -> dict[str, Any]:
        """Those of the method that are given."""
        return self.model_dump(include={"density", "drop", "seed"}, exclude_none=True)


class CombinedTerm(Answer):
    """One term as it was taken."""

    reference: str
    fingerprint: str
    weight: float
    cosine: float | None  #: to the result, over all r * d weights; None when one of the two is zero


class CombinationAnswer(Version):
    """The version that a combination has made or found, with what it was made from."""

    terms: list[CombinedTerm]
    mixed_initializations: list[InitializationSummary] = Field(
        default_factory=list
    )  #: those of the terms that are not the result's
