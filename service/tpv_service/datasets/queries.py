"""Questions to the data sets' tables."""

from __future__ import annotations

from sqlalchemy import Select, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import contains_eager, selectinload

from tpv.errors import InvalidReference, NotFound
from tpv.references import Reference
from tpv_service.datasets.tables import DatasetRow, DatasetVersionRow


def full_dataset() -> Select[DatasetVersionRow]:
    return (
        select(DatasetVersionRow)
        .join(DatasetVersionRow.dataset)
        .options(contains_eager(DatasetVersionRow.dataset), selectinload(DatasetVersionRow.splits))
        .execution_options(populate_existing=True)
    )


async def resolve_dataset(session: AsyncSession, reference: str) -> DatasetVersionRow:
    """The version of a data set that `[ns/]name[:v]` means now."""
    parsed = Reference.parse(reference)
    if parsed.name is None or parsed.alias is not None:
        raise InvalidReference(f"{reference}: a data set is [namespace/]name or [namespace/]name:version")
    statement = full_dataset().where(DatasetRow.namespace == parsed.namespace, DatasetRow.name == parsed.name)
    if parsed.version is not None:
        statement = statement.where(DatasetVersionRow.number == parsed.version)
    row = (await session.scalars(statement.order_by(DatasetVersionRow.number.desc()).limit(1))).first()
    if row is None:
        raise NotFound(f"there is no data set {reference}; see: tpv dataset list", reference=reference)
    return row
