"""Where things are on the service: paths of references, and references of what the service answered."""

from __future__ import annotations

import uuid
from typing import Any

from tpv import errors
from tpv.references import DEFAULT_NAMESPACE, Reference
from tpv.schemas.datasets import Dataset
from tpv.schemas.initializations import Initialization
from tpv.schemas.vectors import InitializationSummary, Version

VectorLike = str | Version
InitializationLike = str | Initialization | InitializationSummary
DatasetLike = str | Dataset


def reference_of(thing: VectorLike | InitializationLike | DatasetLike) -> str:
    """A reference as text, of a reference or of what the service answered."""
    if isinstance(thing, str):
        return thing
    if isinstance(thing, Version | Dataset):
        return thing.reference
    return f"{thing.namespace}/{thing.name}" if thing.name else str(thing.id)


def initialization_path(thing: InitializationLike) -> str:
    """`/initializations/{ns}/{ref}` of a name, id or fingerprint."""
    if not isinstance(thing, str):
        return f"/initializations/{thing.namespace}/{thing.id}"
    reference = Reference.parse(thing)
    if reference.selector:
        raise errors.InvalidReference(f"{thing!r}: an initialization has no versions or aliases")
    return f"/initializations/{reference.namespace}/{reference.name or reference.id or reference.fingerprint}"


def named(text: str, what: str) -> Reference:
    """A reference by name; raises InvalidReference for an id or a fingerprint."""
    reference = Reference.parse(text)
    if reference.name is None:
        raise errors.InvalidReference(f"{text!r}: a {what} is named as [namespace/]name")
    return reference


def bare(text: str, what: str) -> Reference:
    """A name alone; raises InvalidReference when a version or an alias is in it."""
    reference = named(text, what)
    if reference.selector:
        raise errors.InvalidReference(f"{text!r}: name the {what} alone, without version or alias")
    return reference


def vector_path(thing: VectorLike) -> str:
    """`/vectors/{ns}/{name}/versions/{v}`; without a version or alias, the newest."""
    reference = named(reference_of(thing), "vector")
    return f"/vectors/{reference.path}/versions/{reference.selector or 'newest'}"


def dataset_path(thing: DatasetLike) -> str:
    """`/datasets/{ns}/{name}/versions/{v}`; without a version, the newest."""
    reference = named(reference_of(thing), "data set")
    if reference.alias:
        raise errors.InvalidReference(f"{thing!r}: data sets have no aliases, write name or name:version")
    return f"/datasets/{reference.path}/versions/{reference.selector or 'newest'}"


def job_id(job: Any) -> str:
    """The id of a job, given as itself, as text or as a Job."""
    try:
        return str(uuid.UUID(str(getattr(job, "id", job))))
    except ValueError as error:
        raise errors.InvalidReference(f"{str(job)!r} is no job: jobs are named by their id") from error


def split_output(name: str | None, what: str) -> tuple[str, str | None]:
    """Namespace and name of something that is to be created."""
    if name is None:
        return DEFAULT_NAMESPACE, None
    reference = bare(name, what)
    return reference.namespace, reference.name
