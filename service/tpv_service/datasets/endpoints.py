"""Data sets: uploaded as JSON Lines, kept by version, downloaded split by split."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated

from fastapi import APIRouter, Depends, Form, Request, UploadFile
from fastapi.responses import Response
from pydantic import Json
from sqlalchemy.dialects.postgresql import insert
from starlette.concurrency import run_in_threadpool

from tpv.errors import InvalidDataset, NotFound
from tpv.schemas.base import Name, Page
from tpv.schemas.datasets import Dataset, DatasetCreate, Split
from tpv_service.auth.tokens import Actor, Allowed
from tpv_service.content import content_response
from tpv_service.datasets import queries
from tpv_service.datasets.tables import DatasetRow, DatasetVersionRow, SplitRow
from tpv_service.db import Session
from tpv_service.idempotency import IdempotentRequest
from tpv_service.pagination import PagingQuery, page
from tpv_service.storage import BlobStore

router = APIRouter(tags=["datasets"], prefix="/datasets")
Reader = Annotated[Actor, Depends(Allowed("read", "write", "worker"))]
Writer = Annotated[Actor, Depends(Allowed("write"))]


@router.post("/{namespace}/{name}/versions", status_code=201, response_model=Dataset)
async def upload_dataset(
    request: Request,
    session: Session,
    actor: Writer,
    idempotency: IdempotentRequest,
    namespace: Name,
    name: Name,
    metadata: Annotated[Json[DatasetCreate], Form()],
    train: UploadFile,
    validation: UploadFile | None = None,
    test: UploadFile | None = None,
) -> Response:
    """Registers a data set: the files are JSON Lines with `source` and `target`."""
    files_given = {"train": train, "validation": validation, "test": test}
    parts = {name: await file.read() for name, file in files_given.items() if file is not None}
    splits = await run_in_threadpool(_store_splits, request.state.store, parts, metadata.label_words)
    if kept := await idempotency.begin(session, actor.name, metadata, splits):
        return kept
    row, created = await _publish(session, namespace, name, metadata, splits, actor.name)
    return await idempotency.finish(session, dataset_view(row, created=created), 201 if created else 200)


def _store_splits(store: BlobStore, parts: dict[str, bytes], label_words: list[str] | None) -> list[Split]:
    counts = {name: _check_rows(name, content, label_words) for name, content in parts.items()}
    return [
        Split(name=name, rows=counts[name], fingerprint=store.put(content), size=len(content))
        for name, content in sorted(parts.items())
    ]


def _check_rows(split: str, content: bytes, label_words: list[str] | None) -> int:
    """The number of rows; raises InvalidDataset naming the first line that is wrong."""
    count = 0
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidDataset(
                f"{split}, line {number}: not JSON in UTF-8 ({error})", split=split, line=number
            ) from error
        if not (isinstance(row, dict) and all(_is_text(row.get(key)) for key in ("source", "target"))):
            raise InvalidDataset(
                f"{split}, line {number}: a row is an object with the texts `source` and `target`",
                split=split,
                line=number,
            )
        if label_words is not None and row["target"] not in label_words:
            raise InvalidDataset(
                f"{split}, line {number}: target {row['target']!r} is none of the label words {label_words}",
                split=split,
                line=number,
            )
        count += 1
    if not count:
        raise InvalidDataset(f"{split} has no rows", split=split)
    return count


def _is_text(value: object) -> bool:
    """Something to read, and no half of a character, which JSON can hold and no tokenizer takes."""
    return isinstance(value, str) and bool(value.strip()) and not any("\ud800" <= c <= "\udfff" for c in value)


async def _publish(
    session: Session, namespace: str, name: str, metadata: DatasetCreate, splits: list[Split], actor: str
) -> tuple[DatasetVersionRow, bool]:
    """Makes the next version, or finds the one with this content; the row lock of the name orders writers."""
    content = [[(s.name, s.fingerprint) for s in splits], metadata.label_words, metadata.metric]
    fingerprint = f"sha256:{hashlib.sha256(json.dumps(content).encode()).hexdigest()}"
    dataset = (
        await session.execute(
            insert(DatasetRow)
            .values(namespace=namespace, name=name, last_version=1, actor=actor)
            .on_conflict_do_update(
                index_elements=["namespace", "name"], set_={"last_version": DatasetRow.last_version + 1}
            )
            .returning(DatasetRow)
        )
    ).scalar_one()
    made = await session.scalar(
        insert(DatasetVersionRow)
        .values(
            dataset_id=dataset.id,
            number=dataset.last_version,
            label_words=metadata.label_words,
            metric=metadata.metric,
            description=metadata.description,
            fingerprint=fingerprint,
            actor=actor,
        )
        .on_conflict_do_nothing(index_elements=["dataset_id", "fingerprint"])
        .returning(DatasetVersionRow.id)
    )
    if made is None:
        dataset.last_version -= 1
        await session.flush()
    else:
        await session.execute(insert(SplitRow), [{"dataset_version_id": made, **s.model_dump()} for s in splits])
    where = DatasetVersionRow.dataset_id == dataset.id, DatasetVersionRow.fingerprint == fingerprint
    row = (await session.execute(queries.full_dataset().where(*where))).scalar_one()
    return row, made is not None


def dataset_view(row: DatasetVersionRow, *, created: bool = False) -> Dataset:
    return Dataset(
        id=row.id,
        namespace=row.dataset.namespace,
        name=row.dataset.name,
        version=row.number,
        created=created,
        label_words=row.label_words,
        metric=row.metric,
        description=row.description,
        splits=[Split.model_validate(split) for split in row.splits],
        fingerprint=row.fingerprint,
        actor=row.actor,
        created_at=row.created_at,
    )


@router.get("")
async def list_datasets(
    session: Session, _: Reader, paging: PagingQuery, namespace: Name | None = None
) -> Page[Dataset]:
    """The newest version of each data set, by name."""
    statement = queries.full_dataset().where(DatasetVersionRow.number == DatasetRow.last_version)
    if namespace:
        statement = statement.where(DatasetRow.namespace == namespace)
    key = [DatasetRow.namespace, DatasetRow.name]
    return await page(
        session, statement, key, lambda row: [row.dataset.namespace, row.dataset.name], dataset_view, paging
    )


@router.get("/{namespace}/{name}/versions")
async def list_dataset_versions(
    session: Session, _: Reader, paging: PagingQuery, namespace: Name, name: Name
) -> Page[Dataset]:
    """A data set's versions, newest first."""
    await queries.resolve_dataset(session, f"{namespace}/{name}")
    statement = queries.full_dataset().where(DatasetRow.namespace == namespace, DatasetRow.name == name)
    key = [DatasetVersionRow.number]
    return await page(session, statement, key, lambda row: [row.number], dataset_view, paging, descending=True)


@router.get("/{namespace}/{name}/versions/{v}")
async def get_dataset(session: Session, _: Reader, namespace: Name, name: Name, v: str) -> Dataset:
    """One version: `{v}` is a number or `newest`."""
    return dataset_view(await _at(session, namespace, name, v))


@router.get("/{namespace}/{name}/versions/{v}/splits/{split}", response_class=Response)
async def get_split(request: Request, _: Reader, namespace: Name, name: Name, v: str, split: str) -> Response:
    """A split's rows, as the JSON Lines that were uploaded."""
    async with request.state.readers() as session:
        row = await _at(session, namespace, name, v)
    found = next((s for s in row.splits if s.name == split), None)
    if found is None:
        raise NotFound(f"{namespace}/{name}:{row.number} has no split {split!r}; it has {[s.name for s in row.splits]}")
    return await content_response(
        request,
        found.fingerprint,
        media_type="application/jsonl",
        filename=f"{name}-{row.number}-{split}.jsonl",
    )


async def _at(session: Session, namespace: str, name: str, v: str) -> DatasetVersionRow:
    return await queries.resolve_dataset(session, f"{namespace}/{name}" + ("" if v == "newest" else f":{v}"))
