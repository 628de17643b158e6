# Generated from client/tpv/_async/vectors.py by scripts/unasync.py; change that file instead.
# ruff: noqa
# fmt: off
"""`client.vectors`: task prompt vectors with their versions and aliases."""

from __future__ import annotations

import builtins
from collections.abc import Iterator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
from numpy.typing import NDArray
from pydantic import PrivateAttr

from tpv import _base, _bulk, _content, _paths, errors, files
from tpv._sync.http import Http
from tpv._base import UNSET, Call, Unset
from tpv._bulk import ItemLike
from tpv._paths import InitializationLike, VectorLike
from tpv.schemas.base import Page
from tpv.schemas.bulk import BulkCreated, Registered
from tpv.schemas.filters import Filter, SortKey, VersionSearch
from tpv.schemas.lineage import Lineage
from tpv.schemas.vectors import (
    Alias,
    AliasChange,
    AliasSet,
    Evaluation,
    EvaluationCreate,
    Parent,
    Vector,
    VectorUpdate,
    Version,
    VersionCreate,
)
from tpv.vectors import TaskPromptVector, as_prompt


class VectorVersion(Version):
    """One immutable version of a vector, with the way to its content."""

    _http: Http = PrivateAttr()

    def load(self) -> TaskPromptVector:
        """The vector T (r, d), verified against its fingerprint."""
        content = self._http.download(
            f"{_paths.vector_path(self)}/content", _content.Sink(), expected=self.digest
        )
        return TaskPromptVector(
            _content.tensor_of(content, "vector", self.fingerprint), self.initialization.fingerprint
        )

    def download(self, path: str | Path, *, progress: bool = False) -> Path:
        """Saves the stored safetensors file; it appears under its name when it is complete and verified."""
        target = Path(path)
        with _content.transfer(f"downloading {self.reference}", self.size, progress) as advance:
            sink = _content.Sink(target, advance)
            self._http.download(f"{_paths.vector_path(self)}/content", sink, expected=self.digest)
        return target


class Vectors:
    """`client.vectors`: task prompt vectors with their versions and aliases."""

    def __init__(self, http: Http) -> None:
        self._http = http

    def register(
        self,
        name: str,
        *,
        prompt: NDArray[Any] | Any | None = None,
        vector: TaskPromptVector | NDArray[Any] | Any | None = None,
        file: str | Path | None = None,
        initialization: InitializationLike | None = None,
        task: str | Sequence[str] | None = None,
        task_type: str | None = None,
        description: str | None = None,
        tags: Mapping[str, str] | None = None,
        metrics: Sequence[EvaluationCreate | Mapping[str, Any]] | None = None,
        method: str | None = None,
        hyperparameters: Mapping[str, Any] | None = None,
        dataset_fingerprint: str | None = None,
        provenance: Mapping[str, Any] | None = None,
        parents: Sequence[Parent | Mapping[str, Any]] | None = None,
        progress: bool = False,
    ) -> VectorVersion:
        """Registers a tuned soft prompt P*, or a vector T, as the next version of `name`.

        Give one of `prompt` (r, d), `vector` (a TaskPromptVector or an array) and `file` (a safetensors file with one
        tensor named `prompt` or `vector`). A TaskPromptVector knows its initialization. Content that `name` has
        already gives back that version, with `created` False.
        """
        if sum(given is not None for given in (prompt, vector, file)) != 1:
            raise TypeError("give exactly one of prompt=, vector= and file=")
        reference = _paths.bare(name, "vector")
        fingerprint = None
        source: bytes | str | Path
        if file is not None:
            source = file
        elif prompt is not None:
            source = files.dump({"prompt": as_prompt(_content.as_array(prompt), "prompt")})
        else:
            if isinstance(vector, TaskPromptVector):
                initialization, vector = initialization or vector.initialization, vector.tensor
            tensor = as_prompt(_content.as_array(vector), "vector")
            source, fingerprint = files.dump({"vector": tensor}), files.fingerprint(tensor)
        if initialization is None:
            raise TypeError("name the initialization that the prompt was tuned from: initialization=")
        members = _base.given(
            task=[task] if isinstance(task, str) else task,
            task_type=task_type,
            description=description,
            tags=tags,
            metrics=metrics,
            method=method,
            hyperparameters=hyperparameters,
            dataset_fingerprint=dataset_fingerprint,
            fingerprint=fingerprint,
            provenance=provenance,
            parents=parents,
        )
        metadata = _base.message(VersionCreate, initialization=_paths.reference_of(initialization), **members)
        with (
            _content.open_upload(source) as upload,
            _content.transfer(f"uploading {name}", _content.size_of(upload), progress) as advance,
        ):
            call = Call(
                method="POST",
                path=f"/vectors/{reference.path}/versions",
                form={"metadata": metadata.model_dump_json(exclude_unset=True)},
                parts={"file": ("vector.safetensors", _content.Upload(upload, advance), _content.SAFETENSORS)},
                headers=_base.new_key(),
            )
            return self._bind(self._http.ask(VectorVersion, call))

    def register_many(
        self,
        items: Iterable[ItemLike],
        *,
        prompts: NDArray[Any] | Sequence[Any] | Any | None = None,
        vectors: NDArray[Any] | Sequence[TaskPromptVector] | Sequence[Any] | Any | None = None,
        initialization: InitializationLike | None = None,
        task: str | Sequence[str] | None = None,
        task_type: str | None = None,
        description: str | None = None,
        tags: Mapping[str, str] | None = None,
        metrics: Sequence[EvaluationCreate | Mapping[str, Any]] | None = None,
        method: str | None = None,
        hyperparameters: Mapping[str, Any] | None = None,
        dataset_fingerprint: str | None = None,
        provenance: Mapping[str, Any] | None = None,
        progress: bool = False,
    ) -> builtins.list[Registered]:
        """Registers many tuned soft prompts P*, or vectors T, of one initialization; much faster than one by one.

        An item is a name, or a mapping with `name` and what is told of this one alone (`task`, `metrics`, ...); the
        other arguments hold for all that do not. `prompts` or `vectors` is an array (n, r, d) or n arrays (r, d) or
        TaskPromptVectors. The answer is in the order of the items, and is what registering one after the other gives.

        A request takes 5000 items and 16 MB of tensors, and is done as a whole or not at all: an error names the item,
        and the requests before it stay. To register the same again is safe, as equal content is found again.
        """
        if (prompts is None) == (vectors is None):
            raise TypeError("give exactly one of prompts= and vectors=")
        kind, tensors = ("prompts", prompts) if vectors is None else ("vectors", vectors)
        initialization = initialization or _bulk.initialization_of(tensors)
        if initialization is None:
            raise TypeError("name the initialization that the prompts were tuned from: initialization=")
        rows = _bulk.rows_of(tensors, kind[:-1])
        defaults = _base.given(
            task=[task] if isinstance(task, str) else task,
            task_type=task_type,
            description=description,
            tags=tags,
            metrics=metrics,
            method=method,
            hyperparameters=hyperparameters,
            dataset_fingerprint=dataset_fingerprint,
            provenance=provenance,
        )
        reference = _paths.reference_of(initialization)
        made: builtins.list[Registered] = []
        size = sum(row.nbytes for row in rows)
        with _content.transfer(f"uploading {len(rows)} vectors", size, progress) as advance:
            for metadata, file in _bulk.uploads(kind, list(items), rows, initialization=reference, defaults=defaults):
                upload = _content.Upload(_content.open_upload(file), advance)
                call = Call(
                    method="POST",
                    path="/vectors/bulk",
                    form={"metadata": metadata},
                    parts={"file": ("vectors.safetensors", upload, _content.SAFETENSORS)},
                    headers=_base.new_key(),
                )
                made += (self._http.ask(BulkCreated, call)).items
        return made

    def load_many(
        self, refs: Iterable[VectorLike], *, allow_mixed_initializations: bool = False
    ) -> builtins.list[TaskPromptVector]:
        """The vectors T of many versions, in their order, each verified against its fingerprint.

        Raises NotFound naming all that are not there, and IncompatibleVectors for vectors of several initializations;
        when these are allowed, for those of another base model or shape.
        """
        found: builtins.list[TaskPromptVector] = []
        for asked, message in _bulk.downloads(refs, allow_mixed_initializations=allow_mixed_initializations):
            call = Call(method="POST", path="/vectors/bulk/content", message=message, idempotent=True)
            try:
                content = (self._http.send(call)).content
            except errors.ConnectionFailed as error:
                if broken := _bulk.broken_off(error):
                    raise broken from error
                raise
            found += _bulk.vectors_of(content, asked)[1 if found else 0 :]
        return found

    def get(self, ref: VectorLike) -> VectorVersion:
        """One version: `name:3`, `name@alias`, or the newest that is not deleted for `name` alone."""
        return self._bind(self._http.get(VectorVersion, _paths.vector_path(ref)))

    def describe(self, name: str) -> Vector:
        """What the versions of a vector share: tasks, description, tags, aliases."""
        return self._http.get(Vector, f"/vectors/{_paths.bare(name, 'vector').path}")

    def evaluations(self, ref: VectorLike) -> builtins.list[Evaluation]:
        """The figures measured on a version."""
        path = f"{_paths.vector_path(ref)}/evaluations"
        return _base.decode_list(Evaluation, self._http.send(Call(method="GET", path=path)))

    def predictions(self, evaluation: Evaluation | UUID | str) -> builtins.list[dict[str, Any]]:
        """The rows behind an evaluation, in the split's order: `{"prediction": ..., "target": ...}`."""
        number, expected = evaluation, None
        if isinstance(evaluation, Evaluation):
            number, expected = evaluation.id, evaluation.predictions
        content = self._http.download(f"/evaluations/{number}/predictions", _content.Sink(), expected=expected)
        return _content.rows_of(content)

    def update(
        self,
        name: str,
        *,
        description: str | Unset | None = UNSET,
        task_type: str | Unset | None = UNSET,
        tags: Mapping[str, str] | Unset = UNSET,
    ) -> Vector:
        """Changes what is given, and only that; `tags` replaces all tags."""
        members = {"description": description, "task_type": task_type, "tags": tags}
        changes = _base.message(VectorUpdate, **{key: value for key, value in members.items() if value is not UNSET})
        path = f"/vectors/{_paths.bare(name, 'vector').path}"
        return self._http.ask(Vector, Call(method="PATCH", path=path, message=changes, idempotent=True))

    def delete(self, ref: VectorLike, *, force: bool = False) -> None:
        """Deletes a version (`name:3`, `name@alias`) or the whole vector (`name`); `restore` undoes it.

        Raises InUse while an alias, a live job or a descendant points there, unless forced.
        """
        self._http.send(
            Call(method="DELETE", path=_whole_or_version(ref), params={"force": "true" if force else None})
        )

    def restore(self, ref: VectorLike) -> None:
        """Undoes the deletion of a version (`name:3`) or of a whole vector (`name`)."""
        self._http.send(Call(method="POST", path=f"{_whole_or_version(ref)}/restore", idempotent=True))

    def set_alias(
        self, name: str, alias: str, version: int, *, expected_version: int | None = None, reason: str | None = None
    ) -> Alias:
        """Points an alias to a version; raises AliasMoved unless it is at the expected one now."""
        members = _base.given(version=version, expected_version=expected_version, reason=reason)
        call = Call(method="PUT", path=_alias_path(name, alias), message=_base.message(AliasSet, **members))
        return self._http.ask(Alias, call)

    def delete_alias(self, name: str, alias: str) -> None:
        """Removes an alias; its history stays."""
        self._http.send(Call(method="DELETE", path=_alias_path(name, alias)))

    def alias_history(self, name: str, alias: str) -> builtins.list[AliasChange]:
        """Every move of an alias: who, when, from, to, why."""
        call = Call(method="GET", path=f"{_alias_path(name, alias)}/history")
        return _base.decode_list(AliasChange, self._http.send(call))

    def versions(self, name: str, *, page_size: int | None = None) -> Iterator[VectorVersion]:
        """The versions of a vector, fetched a page at a time."""
        path = f"/vectors/{_paths.bare(name, 'vector').path}/versions"
        for version in self._http.pages(VectorVersion, path, {"limit": page_size}):
            yield self._bind(version)

    def list(
        self,
        *,
        namespace: str | None = None,
        task: str | None = None,
        task_type: str | None = None,
        base_model: str | None = None,
        tags: Mapping[str, str] | None = None,
        deleted: bool = False,
        page_size: int | None = None,
    ) -> Iterator[Vector]:
        """The vectors that pass the filters, fetched a page at a time."""
        params = {
            "namespace": namespace,
            "task": task,
            "task_type": task_type,
            "base_model": base_model,
            "tag": [f"{key}:{value}" for key, value in (tags or {}).items()] or None,
            "deleted": "true" if deleted else None,
            "limit": page_size,
        }
        return self._http.pages(Vector, "/vectors", params)

    def search(
        self,
        filter: Filter | Mapping[str, Any] | None = None,  # noqa: A002 # what it is
        *,
        versions: str | None = None,
        sort: Iterable[str | SortKey] = (),
        page_size: int | None = None,
        **conditions: Any,
    ) -> Iterator[VectorVersion]:
        """The versions that pass, fetched a page at a time: of each vector the newest, by name.

        `filter` is a tree of `tpv.schemas.filters.Filter`, or that as a mapping; its members may be given as arguments
        as well: `search(task="rte", metrics=[{"metric": "accuracy", "at_least": 0.8}])`. `versions` is `newest`, `all`
        or `alias:NAME`. `sort` takes `name`, `created_at`, `norm` and `DATASET/SPLIT/METRIC`, descending with a `-` in
        front.
        """
        tree = _base.message(Filter, **filter) if isinstance(filter, Mapping) else filter
        if named := _base.given(**conditions):
            tree = _base.message(Filter, **named, **_base.given(all=[tree] if tree else None))
        keys = [_sort_key(key) for key in sort]
        members = _base.given(filter=tree, versions=versions, sort=keys or None, limit=page_size)
        cursor: str | None = None
        while True:
            request = _base.message(VersionSearch, **members, **_base.given(cursor=cursor))
            page = self._http.post(Page[VectorVersion], "/vectors/search", request, idempotent=True)
            for version in page.items:
                yield self._bind(version)
            cursor = page.next_cursor
            if cursor is None:
                return

    def lineage(self, ref: VectorLike) -> Lineage:
        """All that a version was made from and all that was made from it, over any number of steps."""
        return self._http.get(Lineage, f"{_paths.vector_path(ref)}/lineage")

    def prompt(
        self,
        ref: VectorLike,
        initialization: InitializationLike | None = None,
        scale: float = 1.0,
        *,
        allow_mixed_initializations: bool = False,
        file: str | Path | None = None,
    ) -> NDArray[np.float32]:
        """The soft prompt P_init + scale * T, float32 (r, d), for the vector's own P_init unless another is named.

        With `file` it is saved as well, with vector, initialization and scale in the file's metadata. Raises
        IncompatibleVectors for another initialization, unless that is allowed, and for another base model or shape.
        """
        params = {
            "initialization": None if initialization is None else _paths.reference_of(initialization),
            "scale": scale,
            "allow_mixed_initializations": "true" if allow_mixed_initializations else None,
        }
        sink = _content.Sink(file)
        content = self._http.download(f"{_paths.vector_path(ref)}/prompt", sink, params=params)
        return (files.load(content) if file is None else files.read(file))["prompt"]

    def _bind(self, version: VectorVersion) -> VectorVersion:
        version._http = self._http
        return version


def _sort_key(key: str | SortKey) -> SortKey:
    try:
        return SortKey.parse(key) if isinstance(key, str) else key
    except ValueError as error:
        raise errors.Invalid(f"sort: {error}") from error


def _whole_or_version(ref: VectorLike) -> str:
    """The path of a version when one is named, else that of the whole vector."""
    reference = _paths.named(_paths.reference_of(ref), "vector")
    return _paths.vector_path(ref) if reference.selector else f"/vectors/{reference.path}"


def _alias_path(name: str, alias: str) -> str:
    reference = _paths.named(f"{name}@{alias}", "vector")
    if reference.alias != alias:
        raise errors.InvalidReference(f"{name!r}: name the vector alone")
    return f"/vectors/{reference.path}/aliases/{alias}"
