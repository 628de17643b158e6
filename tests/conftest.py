"""How tests are spread over pytest's processes (`make test`)."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with real processes run one after another, beside all others: two at a time would hinder each other."""
    for item in items:
        if item.path.parent.name == "acceptance":
            item.add_marker(pytest.mark.xdist_group("acceptance"))
