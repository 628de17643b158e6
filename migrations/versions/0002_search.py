"""What a search needs: the transaction that wrote a row, and tasks by index.

Revision ID: 0002
Revises: 0001
"""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for table in ("versions", "changes"):
        op.execute(f"alter table {table} add column txid xid8 not null default pg_current_xact_id()")
    op.drop_index(op.f("ix_versions_initialization_id"), "versions")
    op.create_index(op.f("ix_versions_initialization_id_txid"), "versions", ["initialization_id", "txid"])
    op.create_index(op.f("ix_changes_txid"), "changes", ["txid"])
    op.create_index(op.f("ix_vectors_tasks"), "vectors", ["tasks"], postgresql_using="gin")


def downgrade() -> None:
    op.drop_index(op.f("ix_vectors_tasks"), "vectors")
    op.drop_index(op.f("ix_changes_txid"), "changes")
    op.drop_index(op.f("ix_versions_initialization_id_txid"), "versions")
    op.create_index(op.f("ix_versions_initialization_id"), "versions", ["initialization_id"])
    for table in ("versions", "changes"):
        op.drop_column(table, "txid")
