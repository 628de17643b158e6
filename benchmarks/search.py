"""How fast search is, exact and approximate, by HTTP; against one matrix product and FAISS on the same vectors.

    python benchmarks/search.py [--pools 10000x768,100000x768,100000x4096] [--queries 100]

Pools are registered with benchmarks/fill.py, each an initialization of its own in one registry: 2,000 clusters with
log-normal norms, and plain Gaussian as the worst case. Queries are registered vectors, drawn at random, top 10 by
`dot`, of their own task too unless it is said. The floor is one product of the matrix, in memory, with a vector; recall
is of its ten largest numbers. FAISS is measured where it is installed (`pip install faiss-cpu`), in this process: a
flat index and HNSW (M 16, efConstruction 64, as pgvector's defaults). While the index of the service is being built,
one registration after another is timed; between them, as the floor of the disk, how long it takes to write and sync one
small file. Before the building begins, 500 registrations are timed as the floor of the machine. All files are made
where `TMPDIR` says: with `TMPDIR=/dev/shm` the disk has no part in it.

A pool of 1,000,000 takes about a quarter of an hour to fill, and longer to index; name it, and beside it a small one:
`--pools 1000000x768,10000x768` shows what a family of 1 % costs in such a table. With `--no-indexes` none is built, and
exact search is measured alone.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import psutil
import psycopg
from numpy.typing import NDArray

from tpv import errors

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.fill import PARTS, TASKS
from benchmarks.served import Served, filled, registry

K = 10
EF_SEARCH = (40, 100, 200, 400)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pools", default="10000x768,100000x768,100000x4096", help="COUNTxWIDTH, ...")
    parser.add_argument("--distributions", default="clustered,gaussian")
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--memory", type=int, default=2, help="GB, maintenance_work_mem while an index is built")
    parser.add_argument("--indexes", action=argparse.BooleanOptionalAction, default=True)
    given = parser.parse_args()
    print(f"maintenance_work_mem {given.memory} GB")
    never = {} if given.indexes else {"search_index_above": str(1 << 60)}
    with registry(search_index_memory=str(given.memory << 30), **never) as client:
        for distribution in given.distributions.split(","):
            for pool in given.pools.split(","):
                size, width = map(int, pool.split("x"))
                measure(client, distribution, size, width, given.queries, indexes=given.indexes)


def measure(client: Served, distribution: str, size: int, width: int, queries: int, *, indexes: bool) -> None:
    name = f"{distribution}-{size}x{width}"
    print(f"\n{name}", flush=True)
    began = time.perf_counter()
    matrix = filled(client, name, size, width, distribution)
    print(f"  registered {size / (time.perf_counter() - began):.0f} a second")
    rows = np.random.default_rng(1).choice(size, queries, replace=False).tolist()
    references = [f"fill/{name}-{row:08}" for row in rows]
    places = {f"fill/{name}-{row:08}:1": row for row in range(size)}

    def search(reference: str, **options: object) -> list[int]:
        asked = {"allow_same_task": True, **options}
        return [places[hit.reference] for hit in client.similarity.search(reference, K, **asked).hits]

    began = time.perf_counter()
    while True:
        try:
            search(references[0], accuracy="exact")
            break
        except errors.Unavailable:  # a large family takes longer to read than a request waits
            continue
    print(f"  first search, which reads the family: {time.perf_counter() - began:.1f} s")
    floor = show("one product, in memory", lambda row: matrix @ matrix[row], rows)
    truth = [nearest(matrix, row) for row in rows]
    show("exact", lambda reference: search(reference, accuracy="exact"), references, truth, floor)
    if indexes and wait_for_index(client, references[0], name):
        for ef_search in EF_SEARCH:
            show(
                f"approximate, ef_search {ef_search}",
                lambda reference, ef=ef_search: search(reference, accuracy="approximate", ef_search=ef),
                references,
                truth,
                floor,
            )
        with psycopg.connect(client.database_url) as connection:
            (bytes_,) = connection.execute(
                "select coalesce(sum(pg_relation_size(indexrelid)), 0) from pg_stat_user_indexes"
                " where indexrelname like 'search%'"
            ).fetchone() or (0,)
        print(f"  all indexes so far: {bytes_ / 2**20:.0f} MB")
    show("auto", search, references, truth, floor)
    part = {"tags": {"part": "07"}}
    inside = [nearest(matrix, row, slice(7, None, PARTS)) for row in rows]
    show("exact, of 1 % by a tag", lambda one: search(one, accuracy="exact", **part), references, inside)
    show("auto, of 1 % by a tag", lambda one: search(one, **part), references, inside)
    others = [nearest(matrix, row, own_task=False) for row in rows]
    show("auto, of other tasks", lambda one: search(one, allow_same_task=False), references, others)
    print(f"  memory of the service: {service_memory() / 2**20:.0f} MB resident, mapped files included")
    faiss_beside(matrix, rows, truth, floor)


def nearest(matrix: NDArray[np.float32], row: int, among: slice = slice(None), *, own_task: bool = True) -> list[int]:
    """The K rows, among these, with the largest products with one, which is left out; by NumPy alone."""
    rows, products = np.arange(len(matrix))[among], matrix[among] @ matrix[row]
    products[rows == row] = -np.inf
    if not own_task:
        products[rows % TASKS == row % TASKS] = -np.inf
    return rows[np.argsort(-products)[:K]].tolist()


def wait_for_index(client: Served, reference: str, name: str) -> bool:
    """Whether the family gets an index; registers before and meanwhile, and says how long all of it took."""
    width = client.initializations.get(name).token_dim
    if client.similarity.search(reference, K, accuracy="exact").pool.size * width < 40_000_000:
        return False
    gc.collect()
    gc.freeze()  # what this process would look through for garbage meanwhile would count as waiting for the service
    registered: list[float] = []
    synced: list[float] = []
    random = np.random.default_rng(2)
    with tempfile.TemporaryDirectory() as directory:
        paths = (Path(directory, str(number)) for number in count())

        def register_ten() -> None:
            for _ in range(10):
                vector = random.normal(scale=1e-3, size=(1, width)).astype(np.float32)
                register = partial(client.vectors.register, "meanwhile", vector=vector, initialization=name)
                registered.append(milliseconds(register))
                time.sleep(0.05)
                synced.append(milliseconds(partial(sync_small_file, next(paths))))
                time.sleep(0.05)

        for _ in range(50):
            register_ten()
        show_times("registrations before an index is built", registered)
        registered.clear()
        synced.clear()
        began = time.perf_counter()
        while True:
            try:
                client.similarity.search(reference, K, accuracy="approximate")
                break
            except errors.Conflict:
                register_ten()
    print(f"  index built in {time.perf_counter() - began:.0f} s", flush=True)
    show_times("registrations meanwhile", registered)
    show_times("small files synced meanwhile", synced)
    return True


def sync_small_file(path: Path) -> None:
    """Makes a new file and its name durable, which is less than a registration waits for."""
    with path.open("xb") as file:
        file.write(bytes(4096))
        file.flush()
        os.fsync(file.fileno())
    directory = os.open(path.parent, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


def milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def show_times(name: str, times: list[float]) -> None:
    p50, p95, longest = np.percentile(times, (50, 95, 100))
    long = sum(took > 100 for took in times)
    print(f"  {len(times)} {name}: p50 {p50:.0f} ms, p95 {p95:.0f}, longest {longest:.0f}, {long} over 100", flush=True)


def show(
    name: str,
    ask: Callable[..., object],
    queries: list[object] | list[int] | list[str],
    truth: list[list[int]] | None = None,
    floor: float | None = None,
) -> float:
    """Asks each query once, after a few for warming up; prints p50, p95 and recall; gives p50."""
    for query in queries[:5]:
        ask(query)
    answers, times = [], []
    for query in queries:
        start = time.perf_counter()
        answers.append(ask(query))
        times.append((time.perf_counter() - start) * 1e3)
    times.sort()
    p50, p95 = times[len(times) // 2], times[int(len(times) * 0.95)]
    recall = ""
    if truth is not None:
        found = [len({*one} & {*other}) / K for one, other in zip(answers, truth, strict=True)]
        recall = f"  recall@{K} {np.mean(found):.3f}"
    ratio = f"  {p50 / floor:5.2f} x the product" if floor else ""
    print(f"  {name:28} p50 {p50:8.2f} ms  p95 {p95:8.2f} ms{ratio}{recall}", flush=True)
    return p50


def service_memory() -> int:
    mine = psutil.Process().children(recursive=True)
    return max(child.memory_info().rss for child in mine if "tpv_service.server" in " ".join(child.cmdline()))


def faiss_beside(matrix: NDArray[np.float32], rows: list[int], truth: list[list[int]], floor: float) -> None:
    """The same queries by FAISS in this process; the query itself, which it finds too, is left out."""
    try:
        import faiss
    except ImportError:
        print("  FAISS is not installed")
        return
    flat = faiss.IndexFlatIP(matrix.shape[1])
    flat.add(matrix)
    hnsw = faiss.IndexHNSWFlat(matrix.shape[1], 16, faiss.METRIC_INNER_PRODUCT)
    hnsw.hnsw.efConstruction = 64
    began = time.perf_counter()
    hnsw.add(matrix)
    print(f"  FAISS HNSW built in {time.perf_counter() - began:.0f} s")

    def ask(index: object, row: int) -> list[int]:
        return [found for found in index.search(matrix[row : row + 1], K + 1)[1][0].tolist() if found != row][:K]

    show("FAISS flat", lambda row: ask(flat, row), rows, truth, floor)
    for ef_search in (100, 400):
        hnsw.hnsw.efSearch = ef_search
        show(f"FAISS HNSW, efSearch {ef_search}", lambda row: ask(hnsw, row), rows, truth, floor)


if __name__ == "__main__":
    main()
