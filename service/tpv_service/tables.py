"""All tables: what the migrations are checked against."""

from tpv_service.auth.tables import TokenRow
from tpv_service.datasets.tables import DatasetRow, DatasetVersionRow, SplitRow
from tpv_service.db import Table
from tpv_service.jobs.tables import AttemptRow, CheckpointRow, EventRow, JobRow, NeedRow, StagedRow, WorkerRow
from tpv_service.registry.tables import (
    AliasChangeRow,
    AliasRow,
    BaseModelRow,
    ChangeRow,
    EvaluationRow,
    IdempotencyRow,
    InitializationRow,
    ParentRow,
    VectorRow,
    VersionRow,
)

__all__ = [
    "AliasChangeRow",
    "AliasRow",
    "AttemptRow",
    "BaseModelRow",
    "ChangeRow",
    "CheckpointRow",
    "DatasetRow",
    "DatasetVersionRow",
    "EvaluationRow",
    "EventRow",
    "IdempotencyRow",
    "InitializationRow",
    "JobRow",
    "NeedRow",
    "ParentRow",
    "SplitRow",
    "StagedRow",
    "Table",
    "TokenRow",
    "VectorRow",
    "VersionRow",
    "WorkerRow",
]
