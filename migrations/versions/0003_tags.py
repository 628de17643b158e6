"""Tags by index, so that a filter does not read every vector.

Revision ID: 0003
Revises: 0002
"""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index(op.f("ix_vectors_tags"), "vectors", ["tags"], postgresql_using="gin")


def downgrade() -> None:
    op.drop_index(op.f("ix_vectors_tags"), "vectors")
