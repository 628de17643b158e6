"""Many vectors in one request: what both clients do about it without I/O."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import httpx
import numpy as np
from pydantic import TypeAdapter

from tpv import _base, _content, errors, files
from tpv._paths import VectorLike, reference_of
from tpv.schemas.bulk import REGISTERED_AT_ONCE, BulkContentRequest, BulkCreate, BulkItem, BulkRow
from tpv.schemas.vectors import Version, VersionMetadata
from tpv.vectors import Float32, TaskPromptVector, as_prompt

UPLOAD = 16 << 20  #: bytes of tensors in one request: a quarter of what a service takes by default
METADATA = 512 << 10  #: bytes of metadata in one request: half of what a service takes
LOADED = 256  #: vectors in one download: 77 MB of 100 x 768

ItemLike = str | Mapping[str, Any]  #: a name, or a name with what is told of this one alone


def rows_of(values: Any, what: str) -> list[Float32]:
    """The prompts or vectors of a stacked array (n, r, d) or of a sequence of (r, d), checked; all of one shape."""
    if hasattr(values, "detach"):
        values = _content.as_array(values)
    rows = [
        as_prompt(row.tensor if isinstance(row, TaskPromptVector) else _content.as_array(row), f"{what} {i}")
        for i, row in enumerate(values)
    ]
    for i, row in enumerate(rows):
        if row.shape != rows[0].shape:
            raise errors.InvalidTensor(
                f"the {what} {i} has shape {list(row.shape)}, {what} 0 {list(rows[0].shape)}; send one shape at a time"
            )
    return rows


def initialization_of(vectors: Any) -> str | None:
    """The one initialization that TaskPromptVectors know; None when none of these is one."""
    known = {vector.initialization: i for i, vector in enumerate(vectors) if isinstance(vector, TaskPromptVector)}
    if len(known) > 1:
        (one, i), (other, j) = list(known.items())[:2]
        raise errors.IncompatibleVectors(
            f"the vectors {i} and {j} belong to the initializations {one[:19]}... and {other[:19]}...; register those "
            "of one initialization at a time",
            differences={"initialization": [one, other]},
        )
    return next(iter(known), None)


def uploads(
    kind: str,
    items: Sequence[ItemLike],
    rows: Sequence[Float32],
    *,
    initialization: str,
    defaults: Mapping[str, Any],
) -> Iterator[tuple[str, bytes]]:
    """The two parts, `metadata` and `file`, of as many requests as it takes; `kind` is prompts or vectors."""
    if len(items) != len(rows):
        raise errors.Invalid(f"there are {len(items)} items and {len(rows)} {kind}; give one for each")
    shared = _base.message(VersionMetadata, **defaults)
    checked = [_item(i, item, row, kind) for i, (item, row) in enumerate(zip(items, rows, strict=True))]
    sizes = [len(item.model_dump_json(exclude_unset=True)) for item in checked]
    at = 0
    while at < len(checked):
        end, metadata, tensors = at, 0, 0
        while end < len(checked) and end - at < REGISTERED_AT_ONCE:
            metadata, tensors = metadata + sizes[end], tensors + rows[end].nbytes
            if end > at and (metadata > METADATA or tensors > UPLOAD):
                break
            end += 1
        message = _base.message(BulkCreate, initialization=initialization, defaults=shared, items=checked[at:end])
        yield message.model_dump_json(exclude_unset=True), files.dump({kind: np.stack(rows[at:end])})
        at = end


def _item(i: int, item: ItemLike, row: Float32, kind: str) -> BulkItem:
    members = {"name": item} if isinstance(item, str) else dict(item)
    if kind == "vectors":
        members.setdefault("fingerprint", files.fingerprint(row))
    try:
        return _base.message(BulkItem, **members)
    except errors.Invalid as error:
        raise errors.Invalid(f"item {i}: {error.detail}", index=i, **error.extra) from error


def downloads(
    refs: Iterable[VectorLike], *, allow_mixed_initializations: bool
) -> Iterator[tuple[list[VectorLike], BulkContentRequest]]:
    """As many requests as it takes, each with what it asks for.

    The first vector stands in front of every one of them: so the service compares the initializations of all.
    """
    asked = list(refs)
    for at in range(0, len(asked), LOADED):
        batch = [*asked[: min(at, 1)], *asked[at : at + LOADED]]
        members = {"allow_mixed_initializations": True} if allow_mixed_initializations else {}
        yield batch, _base.message(BulkContentRequest, references=[reference_of(ref) for ref in batch], **members)


def vectors_of(content: bytes, asked: Sequence[VectorLike]) -> list[TaskPromptVector]:
    """The vectors of a downloaded file, each verified against its fingerprint; raises DamagedContent."""
    try:
        tensors = files.load(content)["vectors"]
        rows = TypeAdapter(list[BulkRow]).validate_json(files.metadata(content)["versions"])
        found = [TaskPromptVector(T, row.initialization) for T, row in zip(tensors, rows, strict=True)]
    except (errors.InvalidTensor, KeyError, ValueError) as error:
        raise errors.DamagedContent(f"what came is not the file of vectors that was asked for: {error}") from error
    if len(found) != len(asked):
        raise errors.DamagedContent(f"{len(found)} vectors came where {len(asked)} were asked for")
    for vector, row, ref in zip(found, rows, asked, strict=True):
        expected = ref.fingerprint if isinstance(ref, Version) else row.fingerprint
        if vector.fingerprint != expected:
            raise errors.DamagedContent(
                f"what came for {row.reference} has the fingerprint {vector.fingerprint}, not {expected}"
            )
    return found


def broken_off(error: errors.ConnectionFailed) -> errors.ConnectionFailed | None:
    """What to tell when a download has begun and did not come to its end; None when it has not begun."""
    if not isinstance(error.__cause__, httpx.RemoteProtocolError):
        return None
    return errors.ConnectionFailed(
        f"the download broke off ({error.__cause__}); a damaged vector does that, which `tpv admin verify` finds"
    )
