from __future__ import annotations

import numpy as np
import pytest

import tpv
from tpv.schemas.initializations import Initialization

ROWS, WIDTH = 4, 6


@pytest.fixture
def start() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)


@pytest.fixture
async def family(client: tpv.AsyncClient, start: np.ndarray) -> Initialization:
    return await client.initializations.create("family", base_model="tiny-t5", revision="a" * 40, tensor=start)


def prompt_near(start: np.ndarray, seed: int) -> np.ndarray:
    return (start + np.random.default_rng(seed).normal(size=start.shape)).astype(np.float32)
