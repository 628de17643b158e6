"""A job's row as the wire shows it."""

from __future__ import annotations

from tpv.schemas.jobs import Artifact, Attempt, Job, JobSpec, NeededJob, Progress
from tpv.schemas.vectors import Evaluation
from tpv_service.jobs.tables import JobRow
from tpv_service.registry.views import version_reference


def job_view(row: JobRow) -> Job:
    result = None
    if row.result_version is not None:
        result = version_reference(row.result_version)
    elif row.result_initialization_id is not None:
        result = str(row.result_initialization_id)
    return Job(
        id=row.id,
        method=row.method,
        state=row.state,
        reason=row.reason,
        message=row.message,
        spec=JobSpec.model_validate(row.spec),
        output=row.output,
        needs=[need.needs_id for need in row.needs],
        needed=[NeededJob.model_validate(need.needed) for need in row.needs],
        queue=row.queue,
        priority=row.priority,
        min_memory=row.min_memory,
        progress=Progress.model_validate(row.progress),
        attempts=[Attempt.model_validate(attempt) for attempt in row.attempts],
        result=result,
        result_created=row.result_created,
        artifact=Artifact(digest=row.artifact, size=row.artifact_size or 0) if row.artifact else None,
        metrics=row.metrics,
        provenance=row.provenance,
        evaluations=[Evaluation.model_validate(evaluation) for evaluation in row.evaluations],
        actor=row.actor,
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
    )
