"""Which versions a query means: a tree of conditions, which version of each vector, and the order of a search."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, AwareDatetime, ConfigDict, Field, StringConstraints, model_validator

from tpv.errors import InvalidReference
from tpv.references import NAME_PATTERN, Reference, check_alias
from tpv.schemas.base import Name, Paging, Request, Tags

MAX_DEPTH = 8  #: levels of filters inside filters
MAX_FILTERS = 100  #: objects in one tree

Text = Annotated[str, StringConstraints(min_length=1, max_length=1024)]


def vector_name(text: str) -> str:
    reference = _parsed(text)
    if reference.name is None or reference.selector:
        raise ValueError(f"{text!r}: name a vector as [namespace/]name, without version or alias")
    return reference.path


def _initialization(text: str) -> str:
    if _parsed(text).selector:
        raise ValueError(f"{text!r}: an initialization has no versions; use its name, id or fingerprint")
    return text


def _alias(text: str) -> str:
    try:
        return check_alias(text)
    except InvalidReference as error:
        raise ValueError(str(error)) from error


def _parsed(text: str) -> Reference:
    try:
        return Reference.parse(text)
    except InvalidReference as error:
        raise ValueError(str(error)) from error


class MetricCondition(Request):
    """The version has an evaluation of this metric, data set and split whose value lies in the range, ends included."""

    metric: Text
    dataset: Text | None = Field(None, description="As the evaluation has it; none: any.")
    split: Text | None = Field(None, description="None: any.")
    at_least: float | None = Field(None, allow_inf_nan=False)
    at_most: float | None = Field(None, allow_inf_nan=False)


class Filter(Request):
    """A condition on versions: everything that one object says must hold, so `{}` lets all pass.

    What is said of a vector (its name, task, tags) is said of all its versions. `all` and `any` follow logic: all of
    no filters holds, any of none does not. In Python `not` is written `not_`.
    """

    model_config = ConfigDict(validate_by_name=True, serialize_by_alias=True)

    names: list[Annotated[str, AfterValidator(vector_name)]] | None = Field(
        None, max_length=1000, description="The vector is one of these, as [namespace/]name."
    )
    namespace: Name | None = None
    task: Text | None = Field(None, description="One of the vector's tasks.")
    task_type: Text | None = None
    base_model: Text | None = Field(None, description="The base model's name: a hub id or a path.")
    initialization: Annotated[str, AfterValidator(_initialization)] | None = Field(
        None, description="Name, id or fingerprint."
    )
    tags: Tags | None = Field(None, max_length=64, description="The vector has all of these, with these values.")
    alias: Annotated[str, AfterValidator(_alias)] | None = Field(None, description="The alias points to this version.")
    method: Text | None = None
    metrics: list[MetricCondition] | None = Field(None, max_length=20, description="All of these.")
    created_after: AwareDatetime | None = Field(None, description="Registered then or later.")
    created_before: AwareDatetime | None = Field(None, description="Registered earlier.")

    all: list[Filter] | None = Field(None, max_length=MAX_FILTERS)
    any: list[Filter] | None = Field(None, max_length=MAX_FILTERS)
    not_: Filter | None = Field(None, alias="not")

    @property
    def inner(self) -> tuple[Filter, ...]:
        """The filters directly inside this one."""
        return (*(self.all or ()), *(self.any or ()), *([self.not_] if self.not_ else ()))

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        size, depth = 0, 0
        level: tuple[Filter, ...] = (self,)
        while level:
            size, depth = size + len(level), depth + 1
            level = tuple(inner for each in level for inner in each.inner)
        if depth > MAX_DEPTH or size > MAX_FILTERS:
            raise ValueError(
                f"the filter has {size} objects on {depth} levels; at most {MAX_FILTERS} on {MAX_DEPTH} are taken"
            )
        return self


Versions = Annotated[str, StringConstraints(pattern=rf"^(newest|all|alias:{NAME_PATTERN.strip('^$')})$")]
VERSIONS_HELP = (
    "newest: of each vector the newest version that is not deleted (of an initialization that the filter demands, the "
    "newest of it), if it passes the filter; all: every one that is not deleted; alias:NAME: the one that the alias "
    "points to."
)


class MetricKey(Request):
    """The figure of one metric, measured on one split of one data set; of several, the one measured last."""

    dataset: Text
    split: Text
    metric: Text


class SortKey(Request):
    """What a search is ordered by; versions without the figure come last, in either direction."""

    by: Literal["name", "created_at", "norm"] | MetricKey
    descending: bool = False

    @classmethod
    def parse(cls, text: str) -> SortKey:
        """Reads `name`, `created_at`, `norm` or `DATASET/SPLIT/METRIC`, with a `-` in front when it is to descend.

        Raises ValueError for other text.
        """
        key = text.removeprefix("-")
        match key.rsplit("/", 2):
            case [dataset, split, metric]:
                return cls(by=MetricKey(dataset=dataset, split=split, metric=metric), descending=key != text)
            case [("name" | "created_at" | "norm") as column]:
                return cls(by=column, descending=key != text)
        raise ValueError(f"{text!r} is nothing to sort by: use name, created_at, norm or DATASET/SPLIT/METRIC")


class VersionSearch(Paging):
    """Versions that pass a filter, in an order; ties are broken by namespace, name and version number."""

    filter: Filter = Field(default_factory=Filter)
    versions: Versions = Field("newest", description=VERSIONS_HELP)
    sort: list[SortKey] = Field(default_factory=list, max_length=8)
