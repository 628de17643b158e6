"""Jobs that were submitted for others that need them.

Revision ID: 0008
Revises: 0007
"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("prepares", sa.Boolean(), nullable=False, server_default="false"))
    op.alter_column("jobs", "prepares", server_default=None)


def downgrade() -> None:
    op.drop_column("jobs", "prepares")
