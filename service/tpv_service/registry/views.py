"""Rows of the registry as the wire shows them."""

from __future__ import annotations

from tpv.schemas.initializations import BaseModel, Initialization
from tpv.schemas.vectors import Evaluation, InitializationSummary, Parent, Vector, Version
from tpv_service.registry.tables import InitializationRow, VectorRow, VersionRow


def initialization_view(row: InitializationRow, *, created: bool = False) -> Initialization:
    view = Initialization.model_validate(row)
    view.base_model = BaseModel.model_validate(row.base_model)
    view.created = created
    return view


def initialization_summary(row: InitializationRow) -> InitializationSummary:
    return InitializationSummary(
        id=row.id,
        namespace=row.namespace,
        name=row.name,
        fingerprint=row.fingerprint,
        base_model=row.base_model.name,
        num_virtual_tokens=row.num_virtual_tokens,
        token_dim=row.token_dim,
    )


def version_reference(row: VersionRow) -> str:
    return f"{row.vector.namespace}/{row.vector.name}:{row.number}"


def version_view(row: VersionRow, *, created: bool = False) -> Version:
    return Version(
        id=row.id,
        namespace=row.vector.namespace,
        name=row.vector.name,
        version=row.number,
        created=created,
        fingerprint=row.fingerprint,
        prompt_fingerprint=row.prompt_fingerprint,
        reconstruction_error=row.reconstruction_error,
        initialization=initialization_summary(row.initialization),
        digest=row.digest,
        size=row.size,
        norm=row.norm,
        method=row.method,
        hyperparameters=row.hyperparameters,
        dataset_fingerprint=row.dataset_fingerprint,
        state=row.state,
        provenance=row.provenance,
        parents=[
            Parent(reference=p.reference, fingerprint=p.fingerprint, role=p.role, weight=p.weight) for p in row.parents
        ],
        evaluations=[Evaluation.model_validate(evaluation) for evaluation in row.evaluations],
        aliases=[alias.alias for alias in row.aliases],
        job=row.job_id,
        actor=row.actor,
        created_at=row.created_at,
        deleted_at=row.deleted_at,
    )


def vector_view(row: VectorRow, *, newest_version: int | None, base_models: list[str]) -> Vector:
    return Vector(
        id=row.id,
        namespace=row.namespace,
        name=row.name,
        tasks=row.tasks,
        task_type=row.task_type,
        description=row.description,
        tags=row.tags,
        aliases={alias.alias: alias.version for alias in row.aliases},
        base_models=base_models,
        newest_version=newest_version,
        actor=row.actor,
        created_at=row.created_at,
        deleted_at=row.deleted_at,
    )
