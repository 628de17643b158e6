"""Fills a registry with made-up vectors, to measure on: through the client's bulk registration.

    python benchmarks/fill.py --url URL --count 100000 --dimension 768 --distribution clustered --seed 0

Each vector is a name of its own, `fill/INITIALIZATION-NUMBER`, with one token (r = 1), one of a thousand tasks, and the
tag `part`, which has a hundred values. The same arguments again change nothing; a larger count adds to what is there.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

import tpv
from tpv.files import Float32

BLOCK = 1000  #: vectors that are drawn, and registered, at a time
CLUSTERS, INTRINSIC = 2000, 32
PARTS = 100  #: values of the tag `part`
TASKS = 1000


def vectors(count: int, dimension: int, distribution: str = "clustered", seed: int = 0) -> Iterator[Float32]:
    """`count` vectors in blocks (n, dimension), n <= BLOCK, float32; a larger count begins with the same ones.

    `clustered`: 2,000 clusters around centres in a subspace of 32 dimensions, within which they spread as well; noise
    in all dimensions, a tenth as long; log-normal norms, one a cluster. `gaussian`: nothing but noise.
    """
    random = np.random.default_rng([seed, 0])
    rank = min(INTRINSIC, dimension)
    subspace = np.linalg.qr(random.normal(size=(dimension, rank)))[0].T.astype(np.float32)  # (rank, dimension)
    centres = random.normal(size=(CLUSTERS, rank)).astype(np.float32)
    scales = random.lognormal(sigma=0.5, size=(CLUSTERS, 1)).astype(np.float32) / np.float32(np.sqrt(rank))
    for start in range(0, count, BLOCK):
        random = np.random.default_rng([seed, 1 + start])
        noise = random.standard_normal((BLOCK, dimension), dtype=np.float32)
        if distribution == "gaussian":
            block = noise
        else:
            cluster = random.integers(CLUSTERS, size=BLOCK)
            inside = centres[cluster] + np.float32(0.3) * random.standard_normal((BLOCK, rank), dtype=np.float32)
            block = scales[cluster] * (inside @ subspace + np.float32(0.1 * np.sqrt(rank / dimension)) * noise)
        yield block[: count - start]


def fill(
    client: tpv.Client, initialization: str, blocks: Iterator[Float32], *, threads: int = 4, shown: bool = True
) -> float:
    """Registers the blocks' vectors as newest versions of an initialization with one token; gives vectors a second."""
    lock, began, started, done = threading.Lock(), time.perf_counter(), 0, 0

    def work() -> None:
        nonlocal started, done
        while True:
            with lock:
                block = next(blocks, None)
                if block is None:
                    return
                rows = range(started, started + len(block))
                started += len(block)
            items = [
                {
                    "name": f"fill/{initialization}-{i:08}",
                    "task": f"{initialization}-{i % TASKS}",
                    "tags": {"part": f"{i % PARTS:02}"},
                }
                for i in rows
            ]
            client.vectors.register_many(items, vectors=block[:, np.newaxis], initialization=initialization)
            with lock:
                done += len(block)
                if shown:
                    rate = done / (time.perf_counter() - began)
                    print(f"\r{done} vectors, {rate:.0f} a second", end="", flush=True)

    with ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(work) for _ in range(threads)]:
            future.result()
    if shown:
        print()
    return done / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", required=True, help="of the service")
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--dimension", type=int, default=768)
    parser.add_argument("--distribution", choices=["clustered", "gaussian"], default="clustered")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--initialization", help="a new name, or one that has one token; default: after the data")
    parser.add_argument("--threads", type=int, default=4, help="requests at a time")
    given = parser.parse_args()
    name = given.initialization or f"{given.distribution}-{given.dimension}-{given.seed}"
    with tpv.Client(given.url) as client:
        start = np.random.default_rng(given.seed).normal(size=(1, given.dimension)).astype(np.float32)
        client.initializations.create(name, base_model=f"fill-{name}", unpinned=True, tensor=start)
        fill(
            client,
            name,
            vectors(given.count, given.dimension, given.distribution, given.seed),
            threads=given.threads,
        )


if __name__ == "__main__":
    main()
