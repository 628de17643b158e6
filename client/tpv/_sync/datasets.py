# Generated from client/tpv/_async/datasets.py by scripts/unasync.py; change that file instead.
# ruff: noqa
# fmt: off
"""`client.datasets`: uploaded text-to-text data."""

from __future__ import annotations

import builtins
import contextlib
from collections.abc import Iterator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from tpv import _base, _content, _paths, errors
from tpv._sync.http import Http
from tpv._base import Call
from tpv._paths import DatasetLike
from tpv.schemas.datasets import Dataset, DatasetCreate

Rows = str | Path | Iterable[Mapping[str, Any]]  #: a JSON Lines file, or rows with `source` and `target`


class Datasets:
    """`client.datasets`: uploaded text-to-text data, JSON Lines with `source` and `target`, one file a split."""

    def __init__(self, http: Http) -> None:
        self._http = http

    def upload(
        self,
        name: str,
        train: Rows,
        validation: Rows | None = None,
        test: Rows | None = None,
        *,
        label_words: Sequence[str] | None = None,
        metric: str = "accuracy",
        description: str | None = None,
        progress: bool = False,
    ) -> Dataset:
        """Uploads the splits as the next version of `name`; the same content gives back the version that has it."""
        reference = _paths.bare(name, "data set")
        members = _base.given(label_words=label_words, metric=metric, description=description)
        metadata = _base.message(DatasetCreate, **members)
        splits = _base.given(train=train, validation=validation, test=test)
        with contextlib.ExitStack() as stack:
            opened: dict[str, IO[bytes]] = {}
            for split, rows in splits.items():
                source = rows if isinstance(rows, str | Path) else _content.jsonl(rows)
                opened[split] = stack.enter_context(_content.open_upload(source))
            total = sum(map(_content.size_of, opened.values()))
            advance = stack.enter_context(_content.transfer(f"uploading {name}", total, progress))
            call = Call(
                method="POST",
                path=f"/datasets/{reference.path}/versions",
                form={"metadata": metadata.model_dump_json(exclude_unset=True)},
                parts={
                    split: (f"{split}.jsonl", _content.Upload(file, advance), "application/jsonl")
                    for split, file in opened.items()
                },
                headers=_base.new_key(),
            )
            return self._http.ask(Dataset, call)

    def get(self, ref: DatasetLike) -> Dataset:
        """One version of a data set: `name:2`, or the newest for `name` alone."""
        return self._http.get(Dataset, _paths.dataset_path(ref))

    def download(self, ref: DatasetLike, split: str, path: str | Path, *, progress: bool = False) -> Path:
        """Saves the JSON Lines file of a split; it appears under its name when it is complete and verified."""
        dataset = ref if isinstance(ref, Dataset) else self.get(ref)
        found = _split(dataset, split)
        with _content.transfer(f"downloading {dataset.reference} {split}", found.size, progress) as advance:
            sink = _content.Sink(path, advance)
            self._http.download(
                f"{_paths.dataset_path(dataset)}/splits/{split}", sink, expected=found.fingerprint
            )
        return Path(path)

    def rows(self, ref: DatasetLike, split: str) -> builtins.list[dict[str, Any]]:
        """The rows of a split, verified: `{"source": ..., "target": ...}`."""
        dataset = ref if isinstance(ref, Dataset) else self.get(ref)
        path = f"{_paths.dataset_path(dataset)}/splits/{split}"
        expected = _split(dataset, split).fingerprint
        return _content.rows_of(self._http.download(path, _content.Sink(), expected=expected))

    def versions(self, name: str, *, page_size: int | None = None) -> Iterator[Dataset]:
        """The versions of a data set, fetched a page at a time."""
        path = f"/datasets/{_paths.bare(name, 'data set').path}/versions"
        return self._http.pages(Dataset, path, {"limit": page_size})

    def list(self, *, namespace: str | None = None, page_size: int | None = None) -> Iterator[Dataset]:
        """The newest version of each data set, fetched a page at a time."""
        return self._http.pages(Dataset, "/datasets", {"namespace": namespace, "limit": page_size})


def _split(dataset: Dataset, name: str) -> Any:
    for split in dataset.splits:
        if split.name == name:
            return split
    names = ", ".join(split.name for split in dataset.splits)
    raise errors.NotFound(f"data set {dataset.reference} has no split {name!r}; it has: {names}")
