"""Jobs are tried again: how many attempts in a row were lost.

Revision ID: 0005
Revises: 0004
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("lost", sa.Integer(), nullable=False, server_default="0"))
    op.alter_column("jobs", "lost", server_default=None)


def downgrade() -> None:
    op.drop_column("jobs", "lost")
