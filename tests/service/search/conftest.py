"""A family that searches, matrices and groupings are tried on."""

from __future__ import annotations

import numpy as np
import pytest

import tpv

ROWS, WIDTH, SOURCES = 3, 5, 12


@pytest.fixture
def start() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(ROWS, WIDTH)).astype(np.float32)


@pytest.fixture
async def vectors(client: tpv.AsyncClient, start: np.ndarray) -> dict[str, np.ndarray]:
    """A target `rte` and twelve sources of one family; odd ones are of the type `odd`."""
    random = np.random.default_rng(7)
    await client.initializations.create("family", base_model="tiny-t5", revision="a" * 40, tensor=start)
    made = {}
    for i, name in enumerate(["rte", *(f"s{i:02}" for i in range(SOURCES))]):
        made[name] = random.normal(size=(ROWS, WIDTH)).astype(np.float32)
        await client.vectors.register(
            name,
            vector=made[name],
            initialization="family",
            task=f"task-{name}",
            task_type="odd" if i % 2 else "even",
            tags={"i": str(i)},
            metrics=[{"dataset": "d", "metric": "accuracy", "value": i / 100}],
        )
    return made
