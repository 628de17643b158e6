"""Whether every file that a row points to is there and intact: `tpv admin verify`."""

from __future__ import annotations

from sqlalchemy import CompoundSelect, Text, cast, literal, select, union_all
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.concurrency import run_in_threadpool

from tpv.errors import DamagedContent, NotFound
from tpv_service.datasets.tables import DatasetRow, DatasetVersionRow, SplitRow
from tpv_service.jobs.tables import JobRow
from tpv_service.registry.tables import EvaluationRow, InitializationRow, VectorRow, VersionRow
from tpv_service.storage import BlobStore


async def damaged_files(session: AsyncSession, store: BlobStore) -> tuple[int, list[str]]:
    """How many files were read, and a sentence on each that is missing or does not match its digest.

    Deleted versions count too: they can be restored. Checkpoints do not: where one is damaged, its job goes on from the
    one before. Raises Unavailable when the store does not answer.
    """
    wanted: dict[str, list[str]] = {}
    for owner, digest in (await session.execute(_references())).all():
        wanted.setdefault(digest, []).append(owner)
    problems = []
    for digest, owners in sorted(wanted.items()):
        try:
            await run_in_threadpool(store.get, digest)
        except (NotFound, DamagedContent) as error:
            problems.append(f"{', '.join(owners)}: {error.detail}")
    return len(wanted), problems


def _references() -> CompoundSelect[str, str]:
    """Every digest that a row holds, with the name of what it belongs to."""
    version = VectorRow.namespace + "/" + VectorRow.name + ":" + cast(VersionRow.number, Text)
    dataset = DatasetRow.namespace + "/" + DatasetRow.name + ":" + cast(DatasetVersionRow.number, Text)
    versions = select(version, VersionRow.digest).join(VersionRow.vector)
    states = select(version + " (state)", VersionRow.state).join(VersionRow.vector).where(VersionRow.state.is_not(None))
    predictions = (
        select(version + " (predictions)", EvaluationRow.predictions)
        .join(VersionRow, VersionRow.id == EvaluationRow.version_id)
        .join(VersionRow.vector)
        .where(EvaluationRow.predictions.is_not(None))
    )
    job = literal("job ") + cast(JobRow.id, Text)
    artifacts = select(job, JobRow.artifact).where(JobRow.artifact.is_not(None))
    predictions_of_jobs = (
        select(job + " (predictions)", EvaluationRow.predictions)
        .join(EvaluationRow, EvaluationRow.job_id == JobRow.id)
        .where(EvaluationRow.version_id.is_(None), EvaluationRow.predictions.is_not(None))
    )
    initializations = select(literal("initialization ") + cast(InitializationRow.id, Text), InitializationRow.digest)
    splits = (
        select(dataset + " " + SplitRow.name, SplitRow.fingerprint)
        .join(DatasetVersionRow, DatasetVersionRow.id == SplitRow.dataset_version_id)
        .join(DatasetVersionRow.dataset)
    )
    return union_all(versions, states, predictions, artifacts, predictions_of_jobs, initializations, splits)
