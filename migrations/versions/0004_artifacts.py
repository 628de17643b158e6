"""Results of jobs that are no vectors: an artifact, and evaluations that belong to the job alone.

Revision ID: 0004
Revises: 0003
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("artifact", sa.Text()))
    op.add_column("jobs", sa.Column("artifact_size", sa.BigInteger()))
    op.add_column("jobs", sa.Column("provenance", postgresql.JSONB()))
    op.alter_column("evaluations", "version_id", nullable=True)
    op.create_check_constraint("owner", "evaluations", "version_id is not null or job_id is not null")
    op.create_index(op.f("ix_evaluations_job_id"), "evaluations", ["job_id"])


def downgrade() -> None:
    """Figures that belong to a job alone are gone afterwards; the earlier schema has no place for them."""
    op.drop_index(op.f("ix_evaluations_job_id"), "evaluations")
    op.drop_constraint(op.f("ck_evaluations_owner"), "evaluations", type_="check")
    op.execute("delete from evaluations where version_id is null")
    op.alter_column("evaluations", "version_id", nullable=False)
    op.drop_column("jobs", "provenance")
    op.drop_column("jobs", "artifact_size")
    op.drop_column("jobs", "artifact")
