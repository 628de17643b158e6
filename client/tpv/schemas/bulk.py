"""Many vectors in one request, on the wire."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field

from tpv.errors import InvalidReference
from tpv.references import Reference
from tpv.schemas.base import Answer, Request
from tpv.schemas.vectors import VersionMetadata

REGISTERED_AT_ONCE = 5000  #: items of one request at most
LOADED_AT_ONCE = 1000  #: references of one request at most: the header of the answer names them all


def _path(text: str) -> str:
    """`namespace/name` of a vector's name."""
    try:
        reference = Reference.parse(text)
    except InvalidReference as error:
        raise ValueError(error.detail) from error
    if reference.name is None or reference.selector:
        raise ValueError(f"{text!r}: name the vector alone, as [namespace/]name")
    return reference.path


class BulkItem(VersionMetadata):
    """One vector of many; what it does not tell is taken from the request's `defaults`."""

    name: Annotated[str, AfterValidator(_path)] = Field(description="[namespace/]name")
    fingerprint: str | None = Field(None, description="What the sender believes T's fingerprint to be; checked.")


class BulkCreate(Request):
    """The `metadata` part of a bulk registration.

    The file holds one tensor, `prompts` (P*) or `vectors` (T), (n, r, d); item i is about its row i.
    """

    initialization: str = Field(description="Name, id or fingerprint of the shared initialization.")
    defaults: VersionMetadata = Field(default_factory=VersionMetadata)
    items: list[BulkItem] = Field(min_length=1, max_length=REGISTERED_AT_ONCE)

    def complete_items(self) -> list[BulkItem]:
        """The items with the defaults in the place of what they do not tell."""
        defaults: dict[str, Any] = {key: getattr(self.defaults, key) for key in self.defaults.model_fields_set}
        return [
            item.model_copy(update={key: value for key, value in defaults.items() if key not in item.model_fields_set})
            for item in self.items
        ]


class Registered(Answer):
    """The version that an item has become, or was already."""

    namespace: str
    name: str
    version: int
    fingerprint: str  #: of T
    created: bool  #: by this item; False: the same content was there already

    @property
    def reference(self) -> str:
        """`namespace/name:version`, which always means this version."""
        return f"{self.namespace}/{self.name}:{self.version}"


class BulkCreated(Answer):
    items: list[Registered]  #: in the order of the request


class BulkContentRequest(Request):
    """Asks for the vectors of many versions as one safetensors file."""

    references: list[str] = Field(min_length=1, max_length=LOADED_AT_ONCE)
    allow_mixed_initializations: bool = Field(
        False, description="Vectors of other initializations too; base model and shape are the same nevertheless."
    )


class BulkRow(Answer):
    """What row i of the answer's tensor `vectors` is: entry i of the JSON list `versions` in the file's metadata."""

    reference: str  #: namespace/name:version
    fingerprint: str
    initialization: str  #: fingerprint
