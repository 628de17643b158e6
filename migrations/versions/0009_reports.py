"""When the attempt of a running job has last said anything.

Revision ID: 0009
Revises: 0008
"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("reported_at", sa.DateTime(timezone=True)))
    op.execute("update jobs set reported_at = now() where state = 'running'")


def downgrade() -> None:
    op.drop_column("jobs", "reported_at")
